"""A teacher cache: what the live teacher says, whole or refused, and the same after a kill."""

import json
import math
import pickle
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from transformers import AutoModelForCausalLM

from tests.tiny import CHATML_TEMPLATE, make_model, make_tokenizer
from trl_kd.data import KDCollator, pack, prepare_dataset
from trl_kd.teachers import CacheCollator, CachedTeacher, LocalTeacher, TeacherCache
from trl_kd.teachers.cache import top_sets
from trl_kd.teachers.cache_writer import LOCK, CacheSettings, state_mask, write_cache, written_rows


TOP_P = 0.8
# Rounding to 8 bits: sets of these teachers reach down by at most 6 nats, so half a step is 0.04 at their end
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Eleven rows: whole ones and cut ones, one of an untrained prompt, one with two stretches, one of plain text."""
    subjects = ["fox", "bird", "river", "sky"]
    texts = [
        {"prompt": f"What is the {subject}?", "completion": f" The {subject} is red." * times}
        for subject in subjects
        for times in (1, 8)
    ]
    dataset = prepare_dataset(
        Dataset.from_list(texts), tokenizer, max_length=40, eos_token_ids=[tokenizer.eos_token_id]
    )
    ids = tokenizer("Once upon a time a little fox lived near the river.")["input_ids"]
    extra = [
        {"input_ids": ids, "labels": [-100] * len(ids), "prompt_length": len(ids)},
        {"input_ids": ids, "labels": [-100, *ids[1:4], -100, *ids[5:8], *[-100] * (len(ids) - 8)], "prompt_length": 1},
        {"input_ids": [*ids, tokenizer.eos_token_id], "labels": [*ids, tokenizer.eos_token_id], "prompt_length": 0},
    ]
    columns = ["input_ids", "labels", "prompt_length"]
    return Dataset.from_list(list(dataset.select_columns(columns)) + extra)


@pytest.fixture(scope="module")
def teacher(teacher_path):
    return LocalTeacher(teacher_path)


def settings(**changes) -> CacheSettings:
    return CacheSettings(**({"top_p": TOP_P, "batch_size": 2, "rows_per_part": 4} | changes))


def written(folder, rows, teacher, tokenizer, **changes) -> TeacherCache:
    return write_cache(rows, teacher, tokenizer, folder, [tokenizer.eos_token_id], settings(**changes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, rows, teacher, tokenizer):
    return written(tmp_path_factory.mktemp("cache") / "cache", rows, teacher, tokenizer)


def expected_states(teacher, row: dict, eos_token_ids: list[int], top_p: float) -> list[dict[int, float]]:
    """Id -> log-probability of the sets of a row, by loops over the live teacher's logits, one row at a time."""
    with torch.no_grad():
        log_probs = teacher.model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(dim=-1)
    trained = [index for index in range(1, len(row["labels"])) if row["labels"][index] != -100]
    positions = [index - 1 for index in trained]
    if trained and row["labels"][trained[-1]] not in eos_token_ids:
        positions.append(trained[-1])
    states = []
    for position in positions:
        values, chosen, mass = log_probs[position].tolist(), {}, 0.0
        for token in sorted(range(len(values)), key=lambda token: -values[token]):
            if mass >= top_p:
                break
            chosen[token] = values[token]
            mass += math.exp(values[token])
        states.append(chosen)
    return states


def states_of(row) -> list[dict[int, float]]:
    """The same of a row of a cache."""
    counts, ids, log_probs = row
    ends = np.cumsum(counts)
    return [
        dict(zip(ids[end - count : end].tolist(), log_probs[end - count : end].tolist(), strict=True))
        for count, end in zip(counts, ends, strict=True)
    ]


@pytest.mark.parametrize(("bits", "tolerance"), [(8, TOLERANCE), (32, 1e-5)])
def test_write_cache_has_the_sets_of_the_live_teacher(bits, tolerance, rows, teacher, tokenizer, tmp_path):
    cache = written(tmp_path / "cache", rows, teacher, tokenizer, bits=bits)
    assert len(cache) == len(rows) == 11
    for row, found in zip(rows, cache, strict=True):
        expected = expected_states(teacher, row, [tokenizer.eos_token_id], TOP_P)
        found = states_of(found)
        assert [set(state) for state in found] == [set(state) for state in expected]
        for state, wanted in zip(found, expected, strict=True):
            assert state == pytest.approx(wanted, abs=tolerance)


def test_write_cache_states_are_the_trained_tokens_and_one_after_a_cut(cache, rows, tokenizer):
    trained = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    is_cut = [row["labels"][-1] != tokenizer.eos_token_id for row in rows]
    assert is_cut == [False, True] * 4 + [True, True, False] and trained[8] == 0
    # The row without a trained token has no state at all
    expected = [count + (cut and count > 0) for count, cut in zip(trained, is_cut, strict=True)]
    assert cache.num_states().tolist() == [len(row[0]) for row in cache] == expected
    assert cache.header["counts"]["states"] == sum(expected)


def test_state_mask_is_the_positions_worked_out_by_hand():
    labels = torch.tensor(
        [
            [-100, -100, 5, 2, -100],  # ends with 2
            [-100, 5, 6, -100, -100],  # cut after 6
            [5, 6, -100, 7, -100],  # the first token is predicted by nothing; two stretches
            [5, -100, -100, -100, -100],  # nothing but the first token
            [-100, -100, 5, 6, 3],  # 3 ends a text too
        ]
    )
    expected = [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]
    assert state_mask(labels, [2, 3]).int().tolist() == expected


def test_write_cache_capped_sets_are_the_likeliest_and_counted(cache, rows, teacher, tokenizer, tmp_path):
    capped = written(tmp_path / "cache", rows, teacher, tokenizer, max_tokens=3)
    states = 0
    for found, whole in zip(capped, cache, strict=True):
        assert found[0].tolist() == np.minimum(whole[0], 3).tolist()
        states += int((whole[0] > 3).sum())
    assert capped.header["counts"]["capped_states"] == states > 0
    assert cache.header["counts"]["capped_states"] == 0


def test_write_cache_smaller_vocabulary_is_normalised_over_it(rows, teacher, tokenizer, tmp_path):
    ends = [tokenizer.eos_token_id]
    cut = write_cache(rows, teacher, tokenizer, tmp_path / "cache", ends, settings(bits=32), vocab_size=380)
    assert cut.vocab_size == 380 and cut.header["counts"]["largest_id"] < 380
    with torch.no_grad():
        logits = teacher.model(torch.tensor([rows[0]["input_ids"]])).logits[0, rows[0]["prompt_length"] - 1]
    log_probs = logits[:380].log_softmax(dim=0)
    state = states_of(cut[0])[0]
    assert state == pytest.approx({token: log_probs[token].item() for token in state}, abs=1e-5)


def test_write_cache_top_p_one_keeps_the_whole_vocabulary(rows, teacher, tokenizer, tmp_path):
    cache = written(tmp_path / "cache", rows.select([0]), teacher, tokenizer, top_p=1.0, max_tokens=1000)
    assert (cache[0][0] == len(tokenizer)).all()
    assert cache.header["counts"]["capped_states"] == 0


def test_write_cache_header_says_where_it_comes_from(cache, rows, teacher_path, tokenizer):
    header = json.loads((cache.path / "header.json").read_text())
    assert header["complete"] and header["version"] == 1
    assert header["settings"] == {
        "top_p": TOP_P, "max_tokens": 256, "bits": 8, "batch_size": 2, "rows_per_part": 4
    }  # fmt: skip
    assert header["teacher"]["name"] == teacher_path and header["teacher"]["dtype"] == "float32"
    assert header["teacher"]["revision"] is None
    assert header["vocab_size"] == header["tokenizer"]["size"] == len(tokenizer)
    assert header["eos_token_ids"] == [tokenizer.eos_token_id]
    assert [part["rows"] for part in header["parts"]] == [4, 4, 3]
    assert header["counts"]["tokens"] == sum(len(row[1]) for row in cache)
    assert sorted(path.name for path in cache.path.iterdir()) == [
        "header.json", "part-00000.arrow", "part-00001.arrow", "part-00002.arrow"
    ]  # fmt: skip


def test_teacher_cache_random_access_equals_streaming(cache):
    streamed = list(cache)
    for index in (10, 0, 4, 3, 7, -1):
        for found, expected in zip(cache[index], streamed[index], strict=True):
            assert found.tolist() == expected.tolist()
    with pytest.raises(IndexError, match="Row 11 is asked for, but the cache `.*` has 11 rows."):
        cache[11]


# Killed and resumed


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Killed(Exception):
    """What stands for the end of the process."""


def kill_in(monkeypatch, function: str, call: int) -> None:
    """Let the call of this number of a function of the writer raise."""
    from trl_kd.teachers import cache_writer

    original, calls = getattr(cache_writer, function), []

    def raising(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(cache_writer, function, raising)


# In the fourth batch of the teacher (second part), in the first; while a part is renamed, and between a part and the
# header (`_replace` writes: header, part, header, part, header, ...); before the last header
@pytest.mark.parametrize(
    ("function", "call", "parts"),
    [("_top_sets", 4, 1), ("_top_sets", 1, 0), ("_replace", 4, 1), ("_replace", 5, 1), ("_replace", 8, 3)],
)
def test_write_cache_killed_and_resumed_is_the_uninterrupted_one(
    function, call, parts, cache, rows, teacher, tokenizer, tmp_path, monkeypatch
):
    folder = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, function, call)
        written(folder, rows, teacher, tokenizer)
    done = min(4 * parts, 11)
    assert written_rows(folder) == done and not (folder / LOCK).exists()
    with pytest.raises(ValueError, match=f"`.*` is unfinished: {done} of 11 rows are written. Run `trl-kd cache`"):
        TeacherCache.open(folder)

    batches = []
    from trl_kd.teachers import cache_writer

    original = cache_writer._top_sets
    monkeypatch.setattr(cache_writer, "_top_sets", lambda *args: batches.append(1) or original(*args))
    written(folder, rows, teacher, tokenizer)
    assert len(batches) == 6 - 2 * parts  # what was there was not read again
    assert contents(folder) == contents(cache.path)


def test_write_cache_complete_one_is_left_as_it_is(cache, rows, teacher, tokenizer, monkeypatch):
    before = contents(cache.path)
    kill_in(monkeypatch, "_top_sets", 1)
    assert len(written(cache.path, rows, teacher, tokenizer)) == 11
    assert contents(cache.path) == before


def lengths_read(monkeypatch) -> list[int]:
    """Longest row of each batch that a teacher reads from here on."""
    lengths, original = [], LocalTeacher.hidden_states

    def hidden_states(self, **inputs):
        lengths.append(inputs["input_ids"].shape[1])
        return original(self, **inputs)

    monkeypatch.setattr(LocalTeacher, "hidden_states", hidden_states)
    return lengths


@pytest.mark.parametrize("cut", [None, 100])
@pytest.mark.parametrize("kill", [False, True])
def test_write_cache_lost_part_alone_is_written_again(
    kill, cut, cache, rows, teacher, tokenizer, tmp_path, monkeypatch
):
    folder = tmp_path / "cache"
    shutil.copytree(cache.path, folder)
    whole = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for name in ("part-00000.arrow", "part-00001.arrow") if kill else ("part-00001.arrow",):
        if cut is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes((folder / name).read_bytes()[:-cut])
    if kill:  # after the first of the two, with the third in place
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_in(patch, "_top_sets", 3)
            written(folder, rows, teacher, tokenizer)
        assert written_rows(folder) == 4 + 3
    lengths = lengths_read(monkeypatch)
    written(folder, rows, teacher, tokenizer)
    assert len(lengths) == 2
    assert contents(folder) == contents(cache.path)
    assert (folder / "part-00002.arrow").stat().st_mtime_ns == whole["part-00002.arrow"]


def test_write_cache_reads_the_longest_rows_of_a_part_first(rows, teacher, tokenizer, tmp_path, monkeypatch):
    lengths = lengths_read(monkeypatch)
    written(tmp_path / "cache", rows, teacher, tokenizer, rows_per_part=6)
    own = [len(ids) for ids in rows["input_ids"]]
    first, second = sorted(own[:6], reverse=True), sorted(own[6:], reverse=True)
    assert first != own[:6] and lengths == first[::2] + second[::2]


@pytest.fixture
def warnings_of(monkeypatch):
    from trl_kd.teachers import cache_writer

    found = []
    monkeypatch.setattr(cache_writer.logger, "warning", found.append)
    return found


def test_write_cache_goes_on_with_another_batch_size_and_warns(
    rows, teacher, tokenizer, tmp_path, monkeypatch, warnings_of
):
    folder = tmp_path / "cache"
    whole = written(tmp_path / "whole", rows, teacher, tokenizer, bits=32)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "_top_sets", 3)
        written(folder, rows, teacher, tokenizer, bits=32)
    lengths = lengths_read(monkeypatch)
    resumed = written(folder, rows, teacher, tokenizer, bits=32, batch_size=1)
    assert len(lengths) == 4 + 3
    (warning,) = warnings_of
    assert "`batch_size` is 1, but the teacher has read 2 rows at once" in warning and "last digits" in warning
    assert resumed.settings["batch_size"] == 2  # that of the first part
    for found, expected in zip(resumed, whole, strict=True):
        for state, wanted in zip(states_of(found), states_of(expected), strict=True):
            assert state == pytest.approx(wanted, abs=1e-5)  # float32 sums in another order
    written(folder, rows, teacher, tokenizer, bits=32, batch_size=5)  # whole: nothing is read, and nothing warned of
    assert len(lengths) == 7 and len(warnings_of) == 1


def test_write_cache_batch_size_that_never_worked_is_forgotten(
    rows, teacher, tokenizer, tmp_path, monkeypatch, warnings_of
):
    """Out of memory in the first batch, then smaller batches: the cache is that of the smaller ones alone."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "_top_sets", 1)
        written(tmp_path / "cache", rows, teacher, tokenizer, batch_size=4)
    written(tmp_path / "cache", rows, teacher, tokenizer, batch_size=1)
    written(tmp_path / "whole", rows, teacher, tokenizer, batch_size=1)
    assert warnings_of == [] and contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_write_cache_second_writer_is_refused(cache, rows, teacher, tokenizer):
    before = contents(cache.path)
    with (
        FileLock(str(cache.path / LOCK)),
        pytest.raises(ValueError, match="Another process is writing the cache `.*`.* Wait for it, or name another"),
    ):
        written(cache.path, rows, teacher, tokenizer)
    (cache.path / LOCK).unlink()
    assert contents(cache.path) == before


def test_write_cache_lock_of_a_killed_writer_does_not_block(cache, rows, teacher, tokenizer, tmp_path):
    code = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / LOCK)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="Another process is writing"):
            written(tmp_path, rows, teacher, tokenizer)
        writer.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    written(tmp_path, rows, teacher, tokenizer)
    assert contents(tmp_path) == contents(cache.path)


def test_write_cache_refuses_to_go_on_with_anything_else(cache, rows, teacher, tokenizer, student_path):
    before = contents(cache.path)
    other_tokenizer = make_tokenizer()
    other_tokenizer.chat_template = CHATML_TEMPLATE.replace("user", "human") + " "
    ends = [tokenizer.eos_token_id]
    for arguments, message in (
        ((rows, teacher, tokenizer, cache.path, ends, settings(top_p=0.7)), r"another top_p \(0.8, now 0.7\), so its"),
        (
            (rows, teacher, tokenizer, cache.path, ends, settings(bits=6, rows_per_part=3, batch_size=3)),
            r"another bits \(8, now 6\), another rows_per_part \(4, now 3\), so",
        ),
        ((rows.select(range(5)), teacher, tokenizer, cache.path, ends, settings()), "another dataset, so"),
        ((rows, LocalTeacher(student_path), tokenizer, cache.path, ends, settings()), "another teacher, so"),
        ((rows, teacher, other_tokenizer, cache.path, ends, settings()), "another tokenizer, so"),
        ((rows, teacher, tokenizer, cache.path, [0, *ends], settings()), "another EOS tokens, so"),
        ((rows, teacher, tokenizer, cache.path, ends, settings(), 380), "another vocabulary size, so"),
    ):
        with pytest.raises(ValueError, match=f"holds a cache with {message}.*Name another folder"):
            write_cache(*arguments)
    assert contents(cache.path) == before


def test_write_cache_refuses_a_folder_with_other_files(rows, teacher, tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\).*Name a new or an empty folder."):
        written(tmp_path, rows, teacher, tokenizer)


# Refused: what is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.0}, "`top_p` is 0.0, but it is a probability mass. Set it in (0, 1]."),
        ({"top_p": 1.5}, "`top_p` is 1.5, but it is a probability mass. Set it in (0, 1]."),
        ({"top_p": math.nan}, "`top_p` is nan, but it is a probability mass."),
        ({"bits": 3}, "`bits` is 3, but a log-probability takes 4 to 16 bits"),
        ({"max_tokens": 0}, "`max_tokens` is 0, but nothing can be written then. Set it to 1 or more."),
        ({"max_tokens": 70_000}, "`max_tokens` is 70000, but a set has at most 65536 tokens"),
        ({"batch_size": 0}, "`batch_size` is 0, but nothing can be written then."),
        ({"rows_per_part": -1}, "`rows_per_part` is -1, but nothing can be written then."),
    ],
)
def test_cache_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**changes)


def test_write_cache_refuses_what_has_nothing_to_cache(rows, teacher, tokenizer, tmp_path):
    for dataset, message in (
        (rows.select([8]), "The dataset has 1 rows and no trained token, so the cache would be empty."),
        (rows.select([]), "The dataset has 0 rows and no trained token"),
        (rows.to_iterable_dataset(), "The dataset is a IterableDataset, but the rows of a teacher cache are found by"),
        (rows.remove_columns("labels"), r"has the columns \['input_ids', 'prompt_length'\], but a teacher reads"),
        (pack(rows, 128), "The dataset is packed, but a teacher reads rows"),
    ):
        with pytest.raises(ValueError, match=message):
            written(tmp_path / "cache", dataset, teacher, tokenizer)
    assert not (tmp_path / "cache").exists()


def test_write_cache_refuses_a_teacher_without_numbers(rows, tokenizer, tmp_path):
    model = make_model("llama", len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.get_output_embeddings().weight.data[5] = math.nan
    with pytest.raises(ValueError, match="log-probabilities are not finite.*Check the teacher's weights"):
        written(tmp_path / "cache", rows, LocalTeacher(model), tokenizer)


def test_write_cache_tokens_of_probability_zero_are_left_out(rows, tokenizer, tmp_path):
    model = make_model("gpt2", len(tokenizer), eos_token_id=tokenizer.eos_token_id, tied=False)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    head.bias.data[:100] = -math.inf
    cache = written(tmp_path / "cache", rows, LocalTeacher(model), tokenizer, top_p=1.0, max_tokens=1000)
    assert all((row[1] >= 100).all() and np.isfinite(row[2]).all() for row in cache)


# Refused: what is opened


def test_teacher_cache_open_refuses_what_is_none(cache, tmp_path):
    with pytest.raises(ValueError, match="holds no teacher cache: there is no `header.json` in it. Give the folder"):
        TeacherCache.open(tmp_path / "nothing")
    header = json.loads((cache.path / "header.json").read_text())
    empty = {"rows": 3, "states": 0, "tokens": 0}
    for content, message in (
        ("{", r"header.json` cannot be read \(.*\), and without it nothing is known"),
        ("[]", "is not the header of a teacher cache. Give the folder"),
        ('{"format": "else"}', "is not the header of a teacher cache."),
        (json.dumps(header | {"version": 2}), "has version 2, but this release of trl_kd reads version 1. Write it"),
        (json.dumps(header | {"counts": empty}), "is empty: 3 rows, no state. There is nothing to learn from."),
    ):
        (tmp_path / "header.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            TeacherCache.open(tmp_path)


@pytest.mark.parametrize(
    ("cut", "message"),
    [(True, r"`part-00001.arrow` has \d+ bytes instead of \d+"), (False, "`part-00001.arrow` is m")],
)
def test_teacher_cache_open_refuses_a_file_that_is_not_whole(cut, message, rows, teacher, tokenizer, tmp_path):
    folder = tmp_path / "cache"
    written(folder, rows, teacher, tokenizer)
    file = folder / "part-00001.arrow"
    if cut:
        file.write_bytes(file.read_bytes()[:-50])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=f"is not whole: {message}.*Copy the file again; or run `trl-kd"):
        TeacherCache.open(folder)


# Refused: what does not belong to it


def test_check_rows_refuses_other_rows_with_the_first_that_differs(cache, rows):
    cache.check_rows(rows)
    changed = rows.map(
        lambda row, index: {"labels": [-100, *row["labels"][1:]]} if index == 10 else {}, with_indices=True
    )
    for dataset, message in (
        (changed, r"is not the one of the cache `.*`: 1 of its rows differ \(from row 10 on\)"),
        (
            rows.select([0, 1, 3, 2, *range(4, 11)]),
            r"has the rows of the cache `.*` in another order \(from row 2 on\)",
        ),
        (rows.shuffle(seed=0), r"in another order \(from row 0 on\)"),
        (rows.select(range(6)), r"The dataset has 6 rows, the cache `.*` 11 \(after row 5\)"),
        (rows.select([0, *range(2, 11)]), r"The dataset has 10 rows, the cache `.*` 11 \(from row 1 on\)"),
        (rows.select([]), r"The dataset has 0 rows, the cache `.*` 11"),
        (pack(rows, 128), "The dataset is packed, but the cache .* Set `packing=False`."),
        (rows.to_iterable_dataset(), "The dataset is a IterableDataset, but .* Load it without streaming."),
    ):
        with pytest.raises(ValueError, match=message):
            cache.check_rows(dataset)


def test_check_rows_sees_a_token_that_changed_and_one_that_moved(cache, rows):
    def other_token(row, index):
        return {"input_ids": [*row["input_ids"][:-1], 7]} if index == 3 else {}

    def moved(row, index):  # from the end of one column to the start of the other
        if index != 3:
            return {}
        return {"input_ids": row["input_ids"][:-1], "labels": [row["input_ids"][-1], *row["labels"]]}

    for change in (other_token, moved):
        with pytest.raises(ValueError, match=r"1 of its rows differ \(from row 3 on\)"):
            cache.check_rows(rows.map(change, with_indices=True))


def test_check_rows_takes_the_same_rows_in_other_types_and_columns(cache, rows):
    from datasets import List, Value

    narrow = rows.cast_column("input_ids", List(Value("int32"))).add_column("source", ["x"] * len(rows))
    cache.check_rows(narrow.with_format("torch"))
    cache.check_rows(rows.select(range(11)).map(lambda row: {"prompt_length": 0}))  # changes no state


def test_check_tokenizer_refuses_another(cache, tokenizer):
    cache.check_tokenizer(tokenizer)
    padded, longer, ended, templated, seeded = (make_tokenizer() for _ in range(5))
    padded.pad_token = padded.eos_token
    cache.check_tokenizer(padded)
    longer.add_tokens(["<new>"])
    ended.eos_token = "<|endoftext|>"
    templated.chat_template = CHATML_TEMPLATE + " "
    seeded = make_tokenizer("Where does the red bird sleep? " * 9, vocab_size=330)
    for other, message in (
        (longer, r"another vocabulary \(385 tokens, that of the cache 384\)"),
        (seeded, r"another vocabulary \(\d+ tokens, that of the cache 384\)"),
        (ended, "another BOS or EOS token than"),
        (templated, "another chat template than the one of the cache .* The teacher has read other text"),
    ):
        with pytest.raises(ValueError, match=f"The tokenizer has {message}"):
            cache.check_tokenizer(other)


def test_check_teacher_refuses_another_model_or_path(cache, teacher, teacher_path, student_path):
    cache.check_teacher(teacher_path)
    cache.check_teacher(AutoModelForCausalLM.from_pretrained(teacher_path))
    changed = AutoModelForCausalLM.from_pretrained(teacher_path)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[3, 3] += 1e-3
    half = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.bfloat16)
    for other, message in (
        (student_path, "its config or its weights differ"),
        ("someone/else", r"its name or its revision \(`main`\) differs, and nothing else could be compared"),
        (changed, "its weights or their dtype differ"),
        (half, "its weights or their dtype differ"),
    ):
        expected = rf"is not the one that wrote the cache `.*` \(.*, revision `main`, in float32\): {message}"
        with pytest.raises(ValueError, match=expected):
            cache.check_teacher(other)


@pytest.fixture
def hub_teacher(teacher_path, student_path, tmp_path, monkeypatch):
    """A teacher on the Hub that has been downloaded: `main` is the student's model, the revision `v2` the teacher."""
    folder = tmp_path / "hub" / "models--someone--teacher"
    (folder / "refs").mkdir(parents=True)
    for revision, commit, path in (("main", "a" * 40, student_path), ("v2", "b" * 40, teacher_path)):
        (folder / "refs" / revision).write_text(commit)
        shutil.copytree(path, folder / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "someone/teacher", folder


def test_check_teacher_compares_the_revision(hub_teacher, cache, rows, tokenizer, tmp_path):
    name, folder = hub_teacher
    teacher = LocalTeacher(name, {"revision": "v2"})
    own = written(tmp_path / "cache", rows, teacher, tokenizer)
    assert own.header["teacher"]["revision"] == teacher.revision == "v2"
    assert own.header["teacher"]["files"] == cache.header["teacher"]["files"]
    own.check_teacher(name, "v2")
    own.check_teacher(name, "b" * 40)  # the same files
    for revision in (None, "main"):
        with pytest.raises(ValueError, match="`someone/teacher`, revision `v2`, .* config or its weights differ"):
            own.check_teacher(name, revision)
    with pytest.raises(ValueError, match="another teacher, so its parts"):
        written(tmp_path / "cache", rows, LocalTeacher(name), tokenizer)
    shutil.rmtree(folder)  # on another machine
    own.check_teacher(name, "v2")
    for other, revision in ((name, None), (name, "v3"), ("someone/else", "v2")):
        with pytest.raises(ValueError, match=rf"its revision \(`{revision or 'main'}`\) differs, and nothing else"):
            own.check_teacher(other, revision)


def test_check_teacher_sees_one_changed_weight_in_the_files(cache, teacher_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(teacher_path)
    model.save_pretrained(tmp_path)
    cache.check_teacher(str(tmp_path))  # a copy is the same teacher
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its config or its weights differ"):
        cache.check_teacher(str(tmp_path))


def test_cached_teacher_loads_no_model(cache, teacher_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("from_pretrained", "from_config"):
        monkeypatch.setattr(AutoModelForCausalLM, name, refuse)
    monkeypatch.setattr("torch.nn.Module.__init__", refuse)
    cached = CachedTeacher(str(cache.path))
    assert cached.name == teacher_path and cached.vocab_size == 384 and cached.ends(None) == cache.eos_token_ids
    assert cached.head is None and not cached.heads and cached.tokenizer() is None
    cached.prepare(accelerator=None, vocab_size=384)
    cached.prepare(accelerator=None)
    CacheCollator(KDCollator(0), cached.cache)


def test_cached_teacher_cannot_write(cache):
    with pytest.raises(ValueError, match="knows the dataset's text alone and cannot write .* `lmbda=0`"):
        CachedTeacher(cache).generate([[1, 2]], None, 0, [2], seed=0)


def test_cached_teacher_refuses_a_student_without_its_tokens(cache):
    largest = cache.header["counts"]["largest_id"]
    CachedTeacher(cache).prepare(None, vocab_size=largest + 1)
    with pytest.raises(ValueError, match=f"holds token {largest}, but the student's head has {largest} rows"):
        CachedTeacher(cache).prepare(None, vocab_size=largest)


# Batches


def plain_batch(cache, dataset, indices, top_p=None, max_actions=None):
    """What the collator should add, by loops."""
    kept = []
    for index in indices:
        states = []
        for state in states_of(cache[dataset[index]["cache_row"]]):
            chosen, mass = [], 0.0
            for token, log_prob in state.items():
                if chosen and (top_p is not None and mass >= top_p or max_actions == len(chosen)):
                    break
                chosen.append((token, log_prob))
                mass += math.exp(log_prob)
            states.append(chosen)
        kept.append(states)
    length, width = max(map(len, kept)), max(len(state) for states in kept for state in states)
    shape = (len(kept), length, width)
    ids, log_probs = torch.zeros(shape, dtype=torch.long), torch.full(shape, -math.inf)
    for row, states in enumerate(kept):
        for column, state in enumerate(states):
            for rank, (token, log_prob) in enumerate(state):
                ids[row, column, rank], log_probs[row, column, rank] = token, log_prob
    return ids, log_probs


@pytest.mark.parametrize(
    ("top_p", "max_actions"), [(None, None), (TOP_P, None), (0.5, None), (1e-9, None), (0.6, 4), (None, 2), (None, 1)]
)
def test_cache_collator_agrees_with_a_loop(top_p, max_actions, cache, rows):
    dataset = cache.with_rows(rows).shuffle(seed=1)
    collator = CacheCollator(KDCollator(0, pad_to_multiple_of=8), cache, top_p, max_actions)
    for indices in ([0, 1, 2], [5], [10, 3, 7, 8]):
        batch = collator([dataset[index] for index in indices])
        expected = plain_batch(cache, dataset, indices, None if top_p == TOP_P else top_p, max_actions)
        assert batch["teacher_ids"].dtype == torch.int64 and batch["teacher_log_probs"].dtype == torch.float32
        torch.testing.assert_close((batch["teacher_ids"], batch["teacher_log_probs"]), expected, rtol=0, atol=0)
        plain = KDCollator(0, pad_to_multiple_of=8)([dataset[index] for index in indices])
        assert all(batch[name].equal(value) for name, value in plain.items())
        assert batch.keys() == plain.keys() | {"teacher_ids", "teacher_log_probs"}


def test_cache_collator_own_mass_keeps_the_teachers_sets_whatever_rounding_did(rows, teacher, tokenizer, tmp_path):
    coarse = written(tmp_path / "cache", rows, teacher, tokenizer, bits=4)
    dataset = coarse.with_rows(rows)
    collator = CacheCollator(KDCollator(0), coarse, TOP_P)
    shorter = 0
    for index, row in enumerate(coarse):
        kept = (collator([dataset[index]])["teacher_log_probs"][0] > -math.inf).sum(dim=1)
        assert kept.tolist() == row[0].tolist()
        shorter += int((top_sets(row, TOP_P)[0] < row[0]).sum())
    assert shorter > 0  # the mass of the rounded values is there a token earlier


def test_cache_collator_row_without_states_is_padding(cache, rows):
    dataset = cache.with_rows(rows)
    batch = CacheCollator(KDCollator(0), cache)([dataset[8]])
    assert batch["teacher_ids"].shape[:2] == (1, 0)
    batch = CacheCollator(KDCollator(0), cache)([dataset[8], dataset[0]])
    assert (batch["teacher_log_probs"][0] == -math.inf).all() and (batch["teacher_ids"][0] == 0).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7, 0.79])
def test_cache_collator_smaller_mass_is_near_the_live_teachers_sets(p, cache, rows, teacher, tokenizer):
    """Rounding moves a mass by about its error, 0.01 here, so a set differs only where the live mass is that near."""
    dataset = cache.with_rows(rows)
    for index in (0, 1, 9):
        found = states_of(top_sets(cache[index], p))
        expected = expected_states(teacher, dataset[index], [tokenizer.eos_token_id], p)
        for state, wanted in zip(found, expected, strict=True):
            masses = np.cumsum(np.exp(list(wanted.values())))
            near = abs(masses[-1] - p) < 0.01 or (len(masses) > 1 and abs(masses[-2] - p) < 0.01)
            assert near or set(state) == set(wanted)
            assert abs(len(state) - len(wanted)) <= near


def test_cache_collator_survives_pickling_and_shares_no_file(cache, rows):
    dataset = cache.with_rows(rows)
    collator = CacheCollator(KDCollator(0), cache, 0.6)
    batch = collator([dataset[1]])
    copy = pickle.loads(pickle.dumps(collator))
    assert copy.cache._parts is None and len(pickle.dumps(collator)) < 20_000
    assert copy([dataset[1]])["teacher_log_probs"].equal(batch["teacher_log_probs"])


def test_cache_collator_works_in_the_workers_of_a_data_loader(cache, rows):
    dataset = cache.with_rows(rows)
    collator = CacheCollator(KDCollator(0), cache)
    collator([dataset[0]])  # the files are open in this process already
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collator)
    for index, batch in enumerate(loader):
        expected = plain_batch(cache, dataset, range(4 * index, min(4 * index + 4, 11)))
        assert batch["teacher_log_probs"].equal(expected[1])


def test_cache_collator_takes_evaluation_rows_from_their_own_cache(cache, rows, teacher, tokenizer, tmp_path):
    other = rows.select([1, 5])
    eval_cache = written(tmp_path / "cache", other, teacher, tokenizer, top_p=0.9)
    collator = CacheCollator(KDCollator(0), cache, TOP_P, eval_cache=eval_cache)
    row = eval_cache.with_rows(other)[1] | {"in_eval_cache": True}
    found = collator([row])["teacher_log_probs"]
    # All that it has, which is more than the sets of the run: what is measured is measured on that
    assert found[0].exp().sum(dim=1).min() > 0.85
    expected = plain_batch(eval_cache, {0: row}, [0], None)[1]
    assert found.equal(expected)


def test_cache_collator_keeps_the_methods_of_the_collator(cache):
    collator = CacheCollator(KDCollator(pad_token_id=3), cache)
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1}
    assert isinstance(collator, KDCollator) and collator.pad_token_id == 3
    assert collator.prompt(row, "student") == [5]
    assert collator.complete(row, [9], "student")["input_ids"] == [5, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "`top_p` is 0.0, but it is a probability mass. Set it in (0, 1]."),
        ({"top_p": 1.01}, "`top_p` is 1.01, but it is a probability mass."),
        ({"top_p": 0.9}, "`top_p` is 0.9, but the teacher cache"),
        ({"max_actions": 0}, "`max_actions` is 0, but a set has at least the teacher's likeliest token."),
    ],
)
def test_cache_collator_refuses_sets_that_it_has_not(options, message, cache):
    with pytest.raises(ValueError, match=re.escape(message)):
        CacheCollator(KDCollator(0), cache, **options)


def test_cache_collator_refuses_rows_that_are_not_the_cached_ones(cache, rows):
    collator = CacheCollator(KDCollator(0), cache)
    with pytest.raises(ValueError, match=r"no column `cache_row`.*`TeacherCache.with_rows`.*`lmbda=0`"):
        collator([rows[0]])
    row = cache.with_rows(rows)[0]
    longer = row | {"input_ids": row["input_ids"] * 2, "labels": row["labels"] * 2}
    with pytest.raises(ValueError, match=r"Row 0 of the teacher cache has \d+ states, but .* has \d+ trained tokens"):
        collator([longer])
