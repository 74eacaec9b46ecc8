import hashlib
import json
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from tokenizers import normalizers, processors
from transformers import AutoTokenizer

from tests.tiny import END_OF_TEXT, IM_END, IM_START, make_tokenizer
from trl_kd.data import has_completions, is_plain_text, pack, prepare_dataset, rows


SHARED = Path(__file__).parents[2].parent / "shared" / "data"

TURN = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

# Writes what it is given in `tools` and `style`, and puts a remark into the generation prompt that answers drop.
TOOL_TEMPLATE = (
    "{%- if tools -%}{{- '[tools ' + tools[0]['name'] + ']' -}}{%- endif -%}"
    "{%- if style -%}{{- '[style ' + style + ']' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<' + message['role'] + '>' -}}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}"
    "{{- '<|im_end|>' -}}"
    "{%- else -%}{{- message['content'] -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>(think)' -}}{%- endif -%}"
)


def with_special_tokens(bos, eos, template):
    """A tokenizer with these BOS and EOS, which it writes around a text as in `template`."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    special_tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, None, special_tokens)
    return tokenizer


def prepare(data, tokenizer, **options):
    dataset = Dataset.from_list(data) if isinstance(data, list) else data
    return prepare_dataset(dataset, tokenizer, **{"max_length": None, "eos_token_ids": [], **options})


def texts(row, tokenizer):
    """Prompt, what follows it, and what is trained, as text; each label is its token or -100."""
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    length = row["prompt_length"]
    trained = [label for label in row["labels"] if label != -100]
    return [tokenizer.decode(ids) for ids in (row["input_ids"][:length], row["input_ids"][length:], trained)]


def long_text(length, tokenizer):
    """Text of `length` tokens."""
    text = "!?" * (length // 2) + "!" * (length % 2)
    assert len(tokenizer(text)["input_ids"]) == length
    return text


def test_prepare_dataset_plain_prompt_and_completion_trains_the_completion_and_its_eos(tokenizer):
    [row] = prepare([{"prompt": "The sky is", "completion": " blue."}], tokenizer)
    assert texts(row, tokenizer) == ["The sky is", " blue." + IM_END, " blue." + IM_END]
    assert row["input_ids"][: row["prompt_length"]] == tokenizer("The sky is")["input_ids"]
    assert row["labels"] == [-100] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :]


def test_prepare_dataset_pad_equal_to_eos_still_trains_one_eos():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    [row] = prepare([{"prompt": "The sky is", "completion": " blue." + IM_END + "\n"}], tokenizer)
    assert texts(row, tokenizer) == ["The sky is", " blue." + IM_END, " blue." + IM_END]


def test_prepare_dataset_bos_equal_to_eos_keeps_both():
    tokenizer = with_special_tokens(END_OF_TEXT, END_OF_TEXT, f"{END_OF_TEXT} $A")
    [row] = prepare([{"prompt": "The sky is", "completion": " blue."}], tokenizer)
    assert texts(row, tokenizer) == [END_OF_TEXT + "The sky is", " blue." + END_OF_TEXT, " blue." + END_OF_TEXT]
    [row] = prepare([{"text": "The sky"}], tokenizer)
    assert texts(row, tokenizer)[1:] == [END_OF_TEXT + "The sky" + END_OF_TEXT] * 2


def test_prepare_dataset_tokenizer_that_appends_eos_does_not_end_the_prompt():
    tokenizer = with_special_tokens(IM_START, IM_END, f"{IM_START} $A {IM_END}")
    [row] = prepare([{"prompt": "The sky is", "completion": " blue."}], tokenizer)
    assert texts(row, tokenizer) == [IM_START + "The sky is", " blue." + IM_END, " blue." + IM_END]
    [row] = prepare([{"text": "The sky"}], tokenizer)
    assert texts(row, tokenizer)[1:] == [IM_START + "The sky" + IM_END] * 2


@pytest.mark.parametrize("ending", ["", END_OF_TEXT, END_OF_TEXT + " \n\n", IM_END])
def test_prepare_dataset_completion_with_any_eos_gets_no_other(tokenizer, ending):
    eos_token_ids = [tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    [row] = prepare([{"prompt": "a", "completion": "b" + ending}], tokenizer, eos_token_ids=eos_token_ids)
    assert texts(row, tokenizer)[1] == "b" + (ending.strip() or IM_END)


def test_prepare_dataset_white_space_without_eos_before_it_is_kept(tokenizer):
    [row] = prepare([{"prompt": "a", "completion": "b \n"}], tokenizer)
    assert texts(row, tokenizer)[1] == "b \n" + IM_END


def test_prepare_dataset_tokens_that_merge_over_the_boundary_leave_the_prompt_alone(tokenizer):
    prompt, completion = "The sky is the co", "lour of the fox"
    assert (
        tokenizer(prompt + completion)["input_ids"][: len(tokenizer(prompt)["input_ids"])]
        != (tokenizer(prompt)["input_ids"])
    )
    [row] = prepare([{"prompt": prompt, "completion": completion}], tokenizer)
    assert row["input_ids"][: row["prompt_length"]] == tokenizer(prompt)["input_ids"]
    assert row["input_ids"][row["prompt_length"] : -1] == tokenizer(completion)["input_ids"]


def test_prepare_dataset_completion_is_tokenized_as_a_continuation():
    tokenizer = make_tokenizer()
    # Such a tokenizer takes the space off a completion that stands alone.
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    [row] = prepare([{"prompt": "The sky is", "completion": " blue."}], tokenizer)
    assert texts(row, tokenizer)[1] == " blue." + IM_END


def test_prepare_dataset_text_trains_every_token(tokenizer):
    dataset = prepare([{"story": "The fox ran."}], tokenizer, text_field="story")
    assert texts(dataset[0], tokenizer) == ["", "The fox ran." + IM_END, "The fox ran." + IM_END]
    assert dataset[0]["labels"] == dataset[0]["input_ids"]
    assert is_plain_text(dataset) and has_completions(dataset)


def test_prepare_dataset_prompt_alone_trains_nothing(tokenizer):
    dataset = prepare([{"prompt": "The sky is"}], tokenizer)
    assert dataset[0]["input_ids"] == tokenizer("The sky is")["input_ids"]
    assert dataset[0]["labels"] == [-100] * dataset[0]["prompt_length"]
    assert dataset[0]["prompt_length"] == len(dataset[0]["input_ids"])
    assert not has_completions(dataset) and not is_plain_text(dataset)


def test_prepare_dataset_messages_train_the_last_assistant_turn(tokenizer):
    dataset = prepare([{"messages": EARLIER + TURN}], tokenizer)
    prompt = f"{IM_START}user\nHi{IM_END}\n{IM_START}assistant\nHello{IM_END}\n{IM_START}user\nSky?{IM_END}\n"
    assert texts(dataset[0], tokenizer) == [prompt + f"{IM_START}assistant\n", "Blue." + IM_END, "Blue." + IM_END]
    assert has_completions(dataset) and not is_plain_text(dataset)


def test_prepare_dataset_messages_equal_prompt_and_completion_in_messages(tokenizer):
    [row] = prepare([{"messages": EARLIER + TURN}], tokenizer)
    [split] = prepare([{"prompt": EARLIER + TURN[:1], "completion": TURN[1:]}], tokenizer)
    assert [row[name] for name in ("input_ids", "labels", "prompt_length")] == [
        split[name] for name in ("input_ids", "labels", "prompt_length")
    ]


def test_prepare_dataset_messages_of_one_turn_are_one_completion(tokenizer):
    more = {"role": "assistant", "content": "Red."}
    [row] = prepare([{"messages": TURN + [more]}], tokenizer)
    assert texts(row, tokenizer) == [
        f"{IM_START}user\nSky?{IM_END}\n{IM_START}assistant\n",
        *[f"Blue.{IM_END}\n{IM_START}assistant\nRed.{IM_END}"] * 2,
    ]


def test_prepare_dataset_messages_with_bos_tokenizer_get_no_bos_beside_the_template():
    tokenizer = with_special_tokens(END_OF_TEXT, IM_END, f"{END_OF_TEXT} $A")
    [row] = prepare([{"messages": TURN}], tokenizer)
    assert texts(row, tokenizer)[0] == f"{IM_START}user\nSky?{IM_END}\n{IM_START}assistant\n"


def test_prepare_dataset_conversational_prompt_alone_ends_with_the_generation_prompt(tokenizer):
    [row] = prepare([{"prompt": TURN[:1]}], tokenizer)
    assert texts(row, tokenizer) == [f"{IM_START}user\nSky?{IM_END}\n{IM_START}assistant\n", "", ""]


def test_prepare_dataset_prompt_that_ends_with_the_assistant_is_continued(tokenizer):
    beginning = {"role": "assistant", "content": "It is"}
    [row] = prepare([{"prompt": TURN[:1] + [beginning]}], tokenizer)
    assert texts(row, tokenizer)[0] == f"{IM_START}user\nSky?{IM_END}\n{IM_START}assistant\nIt is"


def test_prepare_dataset_assistant_only_loss_trains_all_assistant_turns(tokenizer):
    [row] = prepare([{"messages": EARLIER + TURN}], tokenizer, assistant_only_loss=True)
    prompt, completion, trained = texts(row, tokenizer)
    assert trained == f"Hello{IM_END}Blue.{IM_END}"
    assert completion == "Blue." + IM_END
    [whole] = prepare([{"messages": EARLIER + TURN}], tokenizer)
    assert (row["input_ids"], row["prompt_length"]) == (whole["input_ids"], whole["prompt_length"])


def test_prepare_dataset_assistant_only_loss_on_completion_trains_its_assistant_turns(tokenizer):
    [row] = prepare([{"prompt": EARLIER + TURN[:1], "completion": TURN[1:] + EARLIER}], tokenizer)
    assert texts(row, tokenizer)[2].startswith(f"Blue.{IM_END}\n{IM_START}user\nHi")
    [masked] = prepare(
        [{"prompt": EARLIER + TURN[:1], "completion": TURN[1:] + EARLIER}], tokenizer, assistant_only_loss=True
    )
    assert texts(masked, tokenizer)[2] == f"Blue.{IM_END}Hello{IM_END}"
    assert (masked["input_ids"], masked["prompt_length"]) == (row["input_ids"], row["prompt_length"])


def test_prepare_dataset_assistant_only_loss_marked_header_belongs_to_the_prompt():
    tokenizer = make_tokenizer()
    header = "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    tokenizer.chat_template = (
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        f"{{%- generation -%}}{header}{{{{- message['content'] + '<|im_end|>' -}}}}{{%- endgeneration -%}}"
        f"{{%- else -%}}{header}{{{{- message['content'] + '<|im_end|>' -}}}}{{%- endif -%}}{{%- endfor -%}}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    )
    options = {"assistant_only_loss": True}
    [row] = prepare([{"messages": EARLIER + TURN}], tokenizer, **options)
    header = f"{IM_START}assistant\n"
    assert texts(row, tokenizer)[1:] == ["Blue." + IM_END, f"{header}Hello{IM_END}{header}Blue.{IM_END}"]
    [row] = prepare([{"messages": EARLIER + TURN}], tokenizer, max_length=row["prompt_length"], **options)
    assert texts(row, tokenizer)[0] == f"{IM_START}user\nHi{IM_END}{header}"
    [row] = prepare([{"prompt": EARLIER + TURN[:1], "completion": TURN[1:]}], tokenizer, **options)
    assert texts(row, tokenizer)[1:] == ["Blue." + IM_END] * 2


def test_prepare_dataset_assistant_only_loss_trains_the_final_eos_outside_the_markers():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    [row] = prepare([{"messages": EARLIER + TURN}], tokenizer, assistant_only_loss=True)
    assert texts(row, tokenizer)[2] == "HelloBlue." + IM_END


def test_prepare_dataset_assistant_only_loss_cut_ends_with_the_last_turn_that_is_left(tokenizer):
    messages = EARLIER + TURN
    [row] = prepare([{"messages": messages}], tokenizer, assistant_only_loss=True)
    [cut] = prepare([{"messages": messages}], tokenizer, assistant_only_loss=True, max_length=row["prompt_length"] - 1)
    assert texts(cut, tokenizer)[0] == f"{IM_START}user\nHi{IM_END}\n{IM_START}assistant\n"
    assert texts(cut, tokenizer)[2] == "Hello" + IM_END


def test_prepare_dataset_tools_and_template_kwargs_reach_the_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tools = [{"name": "look", "description": "Looks"}]
    row = {"messages": TURN, "chat_template_kwargs": {"style": "short"}}
    for options in ({}, {"assistant_only_loss": True}):
        for given in (tools, json.dumps(tools)):
            [prepared] = prepare([{**row, "tools": given}], tokenizer, **options)
            # The answer lacks the remark of the generation prompt, and so does the prompt.
            assert texts(prepared, tokenizer)[0] == "[tools look][style short]<user>Sky?<assistant>"
            assert texts(prepared, tokenizer)[1] == "Blue." + IM_END
    prompts = prepare([{"prompt": TURN[:1], "tools": tools}, {"prompt": TURN[:1], "tools": None}], tokenizer)
    assert texts(prompts[0], tokenizer)[0] == "[tools look]<user>Sky?<assistant>(think)"
    assert texts(prompts[1], tokenizer)[0] == "<user>Sky?<assistant>(think)"


def test_prepare_dataset_prepared_rows_pass_through_unchanged(tokenizer):
    for data in ([{"prompt": "a", "completion": "b"}], [{"prompt": "a"}], [{"text": "a b"}], [{"messages": TURN}]):
        dataset = prepare(data, tokenizer, max_length=50)
        assert prepare(dataset, tokenizer, max_length=50).to_list() == dataset.to_list()


@pytest.mark.parametrize(
    ("columns", "labels", "prompt_length"),
    [
        ({}, [5, 6, 7, 8], 0),
        ({"labels": [-100, 6, -100, 8]}, [-100, 6, -100, 8], 3),
        ({"labels": [-100, 6, 7, -100]}, [-100, 6, 7, -100], 1),
        ({"completion_mask": [0, 0, 1, 1]}, [-100, -100, 7, 8], 2),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}, [-100, 6, -100, 8], 3),
    ],
)
def test_prepare_dataset_tokenized_rows_train_what_their_columns_say(tokenizer, columns, labels, prompt_length):
    [row] = prepare([{"input_ids": [5, 6, 7, 8], **columns}], tokenizer)
    assert (row["input_ids"], row["labels"], row["prompt_length"]) == ([5, 6, 7, 8], labels, prompt_length)


def test_prepare_dataset_long_completions_are_cut_and_counted(tokenizer, caplog):
    data = [{"prompt": "!?!?", "completion": long_text(length, tokenizer)} for length in (1, 5, 6, 9)]
    dataset = prepare(data, tokenizer, max_length=10, name="eval")
    # 4 tokens of prompt and an EOS: the third loses 1 token, the fourth 4.
    assert [len(row["input_ids"]) for row in dataset] == [6, 10, 10, 10]
    assert [row["input_ids"][-1] == tokenizer.eos_token_id for row in dataset] == [True, True, False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 rows of the eval dataset are longer than `max_length` (10 tokens) and lose their end with the EOS, "
        "5 tokens in all. Raise `max_length` to train on whole completions."
    ]


def test_prepare_dataset_rows_that_cannot_be_trained_on_are_dropped_and_counted(tokenizer, caplog):
    prompts = [long_text(length, tokenizer) for length in (3, 10, 9, 11)] + [""]
    data = [{"prompt": prompt, "completion": "!", "index": index} for index, prompt in enumerate(prompts)]
    data += [{"prompt": "a", "completion": completion, "index": 5} for completion in ("", " \n", None)]
    dataset = prepare(data, tokenizer, max_length=10)
    assert dataset["index"][:] == [0, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "6 of 8 rows of the train dataset are dropped: the completion or text is empty (3 rows); the prompt is empty "
        "and the tokenizer has no BOS token to start from (1 rows); the prompt leaves no room for a completion within "
        "`max_length` (2 rows). Raise `max_length` (now 10 tokens) or remove these rows to be rid of this warning.",
        "1 of 2 rows of the train dataset are longer than `max_length` (10 tokens) and lose their end with the EOS, 1 "
        "tokens in all. Raise `max_length` to train on whole completions.",
    ]


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ({"text": "a b"}, {"text": " "}, rows.EMPTY_COMPLETION),
        ({"messages": TURN}, {"messages": TURN[:1] + [{"role": "assistant", "content": " "}]}, rows.EMPTY_COMPLETION),
        ({"prompt": TURN[:1], "completion": TURN[1:]}, {"prompt": TURN[:1], "completion": []}, rows.EMPTY_COMPLETION),
        ({"prompt": "a"}, {"prompt": "!?" * 25}, rows.NO_ROOM),
        ({"prompt": "a"}, {"prompt": ""}, rows.EMPTY_PROMPT),
        ({"prompt": "a"}, {"prompt": None}, rows.EMPTY_PROMPT),
        ({"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5, 6], "labels": [5, -100]}, rows.NOT_TRAINED),
        (
            {"input_ids": [5, 6], "labels": [5, 6]},
            {"input_ids": [5] * 60, "labels": [-100] * 50 + [5] * 10},
            rows.NOT_TRAINED,
        ),
    ],
)
def test_prepare_dataset_bad_row_is_dropped_with_the_reason(tokenizer, caplog, good, bad, reason):
    dataset = prepare([bad, good], tokenizer, max_length=50)
    assert dataset.to_list() == prepare([good], tokenizer, max_length=50).to_list()
    [record] = caplog.records
    assert f"1 of 2 rows of the train dataset are dropped: {reason} (1 rows). " in record.getMessage()


def test_prepare_dataset_many_dropped_rows_first_leave_the_types_alone(tokenizer):
    # More than `datasets` writes at once, which is when it decides on the types.
    dataset = prepare([{"text": ""}] * 1001 + [{"text": "The fox."}], tokenizer)
    assert texts(dataset[0], tokenizer)[1] == "The fox." + IM_END


def test_prepare_dataset_assistant_only_loss_without_assistant_is_dropped(tokenizer, caplog):
    data = [{"prompt": TURN[:1], "completion": completion} for completion in (TURN[:1], TURN[1:])]
    assert len(prepare(data, tokenizer, assistant_only_loss=True)) == 1
    assert f"are dropped: {rows.NOT_TRAINED} (1 rows). " in caplog.records[0].getMessage()


def test_prepare_dataset_completion_of_tool_calls_alone_is_not_empty():
    tokenizer = make_tokenizer()
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
        "{% for call in m['tool_calls'] or [] %}call {{ call['name'] }}{% endfor %};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    [row] = prepare([{"prompt": TURN[:1], "completion": [call]}], tokenizer)
    assert texts(row, tokenizer) == ["user:Sky?;assistant:", "call look;" + IM_END, "call look;" + IM_END]


def test_prepare_dataset_without_losses_is_silent(tokenizer, caplog, conversational_dataset):
    assert len(prepare(conversational_dataset, tokenizer, max_length=512)) == len(conversational_dataset)
    assert not caplog.records


def test_prepare_dataset_keeps_other_columns_and_the_dataset_it_is_given(tokenizer):
    data = [{"prompt": "a", "completion": "b", "score": 0.5, "labels_of": ["x"]}] * 3
    dataset = Dataset.from_list(data)
    prepared = prepare(dataset, tokenizer)
    assert dataset.to_list() == data
    assert set(prepared.column_names) == {*data[0], "input_ids", "labels", "prompt_length"}
    assert prepared.select_columns(list(data[0])).to_list() == data


def test_prepare_dataset_two_processes_give_the_same(tokenizer, caplog):
    data = [{"prompt": "a", "completion": completion} for completion in ("b", "", "c" * 20, "d")]
    one, two = (prepare(data, tokenizer, max_length=10, num_proc=num_proc).to_list() for num_proc in (None, 2))
    assert one == two
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("trl_kd")]
    assert len(messages) == 4 and messages[:2] == messages[2:]


@pytest.mark.parametrize("has_features", [True, False])
def test_prepare_dataset_stream_gives_the_same_rows_and_warns_once(tokenizer, caplog, has_features):
    data = [
        {"prompt": "a", "completion": completion, "score": 0.5} for completion in ("b", "", "c" * 20, "", "d" * 30)
    ]
    expected = prepare(data, tokenizer, max_length=10).to_list()
    caplog.clear()
    stream = Dataset.from_list(data).to_iterable_dataset() if has_features else None
    stream = stream or IterableDataset.from_generator(lambda: iter(data))
    prepared = prepare(stream, tokenizer, max_length=10)
    assert isinstance(prepared, IterableDataset)
    assert list(prepared) == expected and list(prepared) == expected
    assert has_completions(prepared) and not is_plain_text(prepared)
    assert [record.getMessage() for record in caplog.records] == [
        "A row of the train dataset is dropped: the completion or text is empty. More may follow without a message, "
        "since a stream can't be counted beforehand. Remove such rows to be rid of this warning.",
        "A row of the train dataset is longer than `max_length` (10 tokens) and loses its last 12 tokens with the "
        "EOS. More may follow without a message, since a stream can't be counted beforehand. Raise `max_length` to "
        "train on whole completions.",
    ]


def test_prepare_dataset_tensor_format_is_read_as_plain_rows(tokenizer):
    dataset = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    [row] = prepare(dataset.with_format("torch"), tokenizer)
    assert row == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1}


def test_row_formatter_hash_depends_on_the_code():
    # `datasets` looks results up in its cache by this hash, in which code of a module counts by its name alone.
    assert rows._REVISION == hashlib.sha256(Path(rows.__file__).read_bytes()).hexdigest()
    fields = (None, frozenset(), None, "text", False, None, 0)
    formatters = [rows.RowFormatter(*fields, **revision) for revision in ({}, {}, {"revision": "older"})]
    assert formatters[0].revision == rows._REVISION
    hashes = [Hasher.hash(formatter) for formatter in formatters]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            [{"question": "a", "answer": "b"}],
            {"name": "eval"},
            "The eval dataset has the columns `question`, `answer`, none of which holds text to train on. Rename its "
            "columns to `prompt` and `completion`, `messages`, `prompt` alone, `text` (set by `dataset_text_field`), "
            "or `input_ids`.",
        ),
        ([{"completion": "a"}], {}, "The train dataset has the columns `completion`, none of which holds text"),
        (
            [{"prompt": "a", "completion": ""}, {"prompt": "!?!?", "completion": "a"}],
            {"max_length": 4},
            "2 of 2 rows of the train dataset had to be dropped: the completion or text is empty (1 rows); the prompt "
            "leaves no room for a completion within `max_length` (1 rows). Nothing is left to train on. Raise "
            "`max_length` (now 4 tokens) or check what the columns hold.",
        ),
        (
            [{"text": " "}],
            {},
            "the completion or text is empty (1 rows). Nothing is left to train on. Raise `max_length` (now no limit)",
        ),
        (
            [{"messages": TURN[:1]}],
            {},
            "the last of `messages` is not the assistant's, so there is no completion (1 rows)",
        ),
        ([{"messages": []}], {}, "the last of `messages` is not the assistant's"),
        (
            [{"messages": TURN[1:]}],
            {},
            "The prompt of a conversation ends with nothing, but a chat template asks for an answer only after a user "
            "or tool message. Add one, remove the row, or pass the conversation as text.",
        ),
        (
            [{"messages": TURN[1:]}],
            {"assistant_only_loss": True},
            "The prompt of a conversation ends with nothing, but a chat template asks",
        ),
        (
            [{"prompt": [{"role": "system", "content": "a"}], "completion": TURN[1:]}],
            {"assistant_only_loss": True},
            "The prompt of a conversation ends with a `system` message, but a chat template asks",
        ),
        (
            [{"messages": [{"role": "system", "content": "a"}, TURN[1]]}],
            {},
            "The prompt of a conversation ends with a `system` message, but a chat template asks",
        ),
        (
            [{"prompt": TURN[:1], "completion": "Blue."}],
            {},
            "A row has a `prompt` of type list and a `completion` of type str, but text and messages can't be joined. "
            "Pass both as text, or both as lists of messages.",
        ),
        (
            [{"input_ids": [5, 6], "labels": [5]}],
            {},
            "A tokenized row has 2 `input_ids` and 1 `labels`, but there must be one label for each token. Use -100 "
            "for the tokens that are not trained.",
        ),
        (
            [{"prompt": "a", "completion": "b"}],
            {"assistant_only_loss": True},
            "`assistant_only_loss` is True, but the train dataset holds text, in which no turns can be told apart. "
            "Set it to False, or pass `messages`.",
        ),
    ],
)
def test_prepare_dataset_bad_input_raises(tokenizer, data, options, message):
    with pytest.raises(ValueError) as error:
        prepare(data, tokenizer, **options)
    assert message in str(error.value)


def test_prepare_dataset_no_rows_raises(tokenizer):
    with pytest.raises(ValueError, match="The train dataset has no rows, so there is nothing to train on. Pass one"):
        prepare(Dataset.from_dict({"text": []}), tokenizer)


def test_prepare_dataset_tokenizer_without_eos_raises():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="The tokenizer has no EOS token, but.*Set its `eos_token`"):
        prepare([{"text": "a"}], tokenizer)


@pytest.mark.parametrize("data", [{"messages": TURN}, {"prompt": TURN[:1]}])
def test_prepare_dataset_messages_without_chat_template_raise(data):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="holds messages, but the tokenizer has no chat template.*Set its `ch"):
        prepare([data], tokenizer)


def test_prepare_dataset_assistant_only_loss_without_generation_markers_raises():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- generation -%}", "").replace(
        "{%- endgeneration -%}", ""
    )
    assert len(prepare([{"messages": TURN}], tokenizer)) == 1
    with pytest.raises(ValueError, match="template is not training-compatible"):
        prepare([{"messages": TURN}], tokenizer, assistant_only_loss=True)


def test_pack_keeps_every_token_and_its_label(tokenizer, prompt_completion_dataset):
    prepared = prepare(prompt_completion_dataset, tokenizer, max_length=64)
    packed = pack(prepared, max_length=64)
    assert set(packed.column_names) == {"input_ids", "labels", "seq_lengths"}
    assert len(packed) < len(prepared) / 2 and all(len(row["input_ids"]) <= 64 for row in packed)
    sequences = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            sequences.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
        assert start == len(row["input_ids"])
    assert sorted(sequences) == sorted(zip(prepared["input_ids"][:], prepared["labels"][:], strict=True))


def test_pack_stream_equals_dataset(tokenizer, prompt_completion_dataset):
    prepared = prepare(prompt_completion_dataset, tokenizer, max_length=64)
    assert list(pack(prepared.to_iterable_dataset(), 64)) == pack(prepared, 64).to_list()


def test_pack_unknown_strategy_raises(tokenizer, prompt_completion_dataset):
    with pytest.raises(ValueError, match="Invalid packing strategy 'tight'"):
        pack(prepare(prompt_completion_dataset, tokenizer), 64, "tight")


@pytest.fixture(
    scope="module", params=["tokenizers/gpt2", "tokenizers/mistral", "tokenizers/qwen", "models/stories260K"]
)
def real_tokenizer(request):
    folder = SHARED / request.param
    if not folder.is_dir():
        pytest.skip(f"{request.param} is not in ../shared/data")
    return AutoTokenizer.from_pretrained(folder)


# Split before a space, after it, inside a word (mistral: "st" and "ory" are one token), and at a line break.
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The sky is", " blue."),
        ("The sky is ", "blue."),
        ("A long st", "ory.\nEnd"),
        ("One.\n", "\nTwo."),
        ("a", "b\n"),
    ],
)
def test_prepare_dataset_real_tokenizer_adds_and_loses_no_character(real_tokenizer, prompt, completion):
    [row] = prepare([{"prompt": prompt, "completion": completion}], real_tokenizer)
    assert row["input_ids"][: row["prompt_length"]] == real_tokenizer(prompt)["input_ids"]
    assert row["input_ids"][-1] == row["labels"][-1] == real_tokenizer.eos_token_id
    whole = real_tokenizer(prompt + completion)["input_ids"]
    assert real_tokenizer.decode(row["input_ids"][:-1]) == real_tokenizer.decode(whole)


def test_prepare_dataset_qwen_messages_end_with_the_end_of_turn():
    if not (SHARED / "tokenizers/qwen").is_dir():
        pytest.skip("tokenizers/qwen is not in ../shared/data")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen")
    eos_token_ids = tokenizer.convert_tokens_to_ids([END_OF_TEXT, IM_END])
    [row] = prepare([{"messages": TURN}], tokenizer, eos_token_ids=eos_token_ids)
    assert texts(row, tokenizer)[0].endswith(f"{IM_START}user\nSky?{IM_END}\n{IM_START}assistant\n")
    assert texts(row, tokenizer)[1:] == ["Blue." + IM_END] * 2


@pytest.mark.parametrize("is_conversational", [False, True])
def test_truncated_completion_gets_no_eos(tokenizer, is_conversational):
    row = {"prompt": "The sky is", "completion": " blue and"}
    if is_conversational:
        row = {
            "prompt": [{"role": "user", "content": "What is the sky?"}],
            "completion": [{"role": "assistant", "content": "It is blue and"}],
        }
    options = {"max_length": None, "eos_token_ids": [tokenizer.eos_token_id]}
    whole, cut = prepare_dataset(
        Dataset.from_list([row | {"truncated": False}, row | {"truncated": True}]), tokenizer, **options
    )
    assert whole["input_ids"][-1] == tokenizer.eos_token_id
    assert cut["input_ids"] == whole["input_ids"][:-1] and cut["labels"] == whole["labels"][:-1]
