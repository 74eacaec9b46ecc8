"""Where the teacher's next-token distributions come from."""

from trl_kd.teachers.cache import CacheCollator, CachedTeacher, TeacherCache
from trl_kd.teachers.group import TeacherGroup
from trl_kd.teachers.local import LocalTeacher
from trl_kd.teachers.shared import SharedTeacher
from trl_kd.teachers.vocabulary import shared_vocab_size


__all__ = [
    "CacheCollator",
    "CachedTeacher",
    "LocalTeacher",
    "SharedTeacher",
    "TeacherCache",
    "TeacherGroup",
    "shared_vocab_size",
]
