"""The tokenizer of a folder, its special tokens, and chat templates against transformers' own rendering."""

import concurrent.futures
import json
import os
import signal
import sys
import threading
from unittest import mock

import pytest
import tokenizers

from illada.generation import loop as generation_loop
from illada.text import chat_template
from illada.text.chat_template import merge_system, render_chat_template
from illada.text.tokenizer import Continuation, Tokenizer, bos_prefix
from illada.text.tokenizer_files import load_tokenizer
from illada.text.training import SPECIAL_TOKENS, train_tokenizer

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "ignored" %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}
    {{- message.content + '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
BLOCKS = """\
{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ bos_token }}{{ message['content'] }}
    {% elif message['role'] == 'assistant' %}
{{ message['content'] | tojson }}{{ eos_token }}
    {% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
    {% endif %}
{% endfor %}
{{ strftime_now('%Y') }} {{ {'a': '<é>', 'b': [1]} | tojson(indent=2) }}{{ pad_token is defined }}
"""
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'model: ' }}{% endif %}"
)
USER = {"role": "user", "content": " What is 2 + 2? <b>&"}
ASSISTANT = {"role": "assistant", "content": "It is \n"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(["the quick brown fox\n"] * 9, 300).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def configure(folder, **values):
    names = {f"{name}_token": SPECIAL_TOKENS[name] for name in ("bos", "eos")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **values}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_pretrained(folder)


def test_special_tokens_by_name(folder):
    assert Tokenizer.from_pretrained(folder).special_token_id("eos_token") is None  # nothing names it
    (folder / "special_tokens_map.json").write_text(
        '{"eos_token": "the old map", "pad_token": {"content": "<[PAD▁TOKEN]>"}}'
    )
    tokenizer = configure(folder, bos_token={"content": SPECIAL_TOKENS["bos"], "lstrip": False}, mask_token=None)
    ids = [tokenizer.special_token_id(f"{name}_token") for name in ("bos", "eos", "pad", "mask", "unk")]
    assert ids == [0, 2, 1, None, None]
    assert tokenizer.token_to_id("<[MASK]>") == 5 and tokenizer.token_to_id("<[none]>") is None
    assert Tokenizer.from_pretrained(folder / "tokenizer.json").special_tokens == tokenizer.special_tokens


def test_encode_and_decode(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    assert 5 in tokenizer.encode("the <[MASK]>") and 5 not in tokenizer.encode(
        "the <[MASK]>", parse_special_tokens=False
    )
    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox"
    assert tokenizer.decode([5]) == "" and tokenizer.decode([5], skip_special_tokens=False) == "<[MASK]>"


def change(folder, **changes):
    """Change values in tokenizer.json; those of "added_tokens" are flags of each token."""
    values = json.loads((folder / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        token.update(changes.get("added_tokens", {}))
    values.update({name: value for name, value in changes.items() if name != "added_tokens"})
    (folder / "tokenizer.json").write_text(json.dumps(values))


TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
    "pad_token": "<[PAD▁TOKEN]>",
}  # fmt: skip


def test_settings_of_whoever_saved_it_cut_and_pad_nothing(folder):
    text = "the quick brown fox" * 9
    want = Tokenizer.from_pretrained(folder).encode(text)
    change(folder, truncation=TRUNCATION, padding=PADDING)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode(text) == want and len(want) > 8
    assert tokenizer.encode("x") == load_tokenizer(folder).encode("x").ids and len(tokenizer.encode("x")) == 1


def test_text_goes_on_as_it_reads_behind_the_prompt():
    """A Strip decoder takes the first word's space away, which belongs to it only at the start of a text."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "▁the", "▁quick", "▁fox", "es"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.add_special_tokens(["<s>"])
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode([3, 4]) == "quick fox"
    for tokens in (backend, tokenizer):
        assert Continuation(tokens, [1, 2] * 20).decode([3, 4]) == " quick fox"
        assert Continuation(tokens, [1, 2]).decode([5]) == "es"
        assert Continuation(tokens, [2, 1]).decode([3, 4]) == "quick fox"  # a chat template's end: a new text
        assert Continuation(tokens, []).decode([3]) == "quick" and Continuation(tokens, [2]).decode([]) == ""
        assert Continuation(tokens, [2]).decode([1, 3], skip_special_tokens=False) == "<s> quick"


def test_a_prompt_begins_with_what_the_tokenizer_adds_and_once(folder):
    """And does not end with it: nothing would follow an eos."""
    bare = load_tokenizer(folder)
    for single, prefix in (("$A", []), ("[b] $A", [0]), ("[b] $A [e]", [0]), ("$A [e]", []), ("[b] [e] $A", [0, 2])):
        names = {"[b]": (SPECIAL_TOKENS["bos"], 0), "[e]": (SPECIAL_TOKENS["eos"], 2)}
        for name, (token, _) in names.items():
            single = single.replace(name, token)
        processor = tokenizers.processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=list(names.values())
        )
        backend = load_tokenizer(folder)
        backend.post_processor = processor
        tokenizer, the = Tokenizer(backend), bare.encode("the").ids
        assert tokenizer.encode_prompt("the") == [*prefix, *the] == generation_loop.encode(backend, "the", "prompts[0]")
        assert generation_loop.encode(tokenizer, "the", "prompts[0]") == [*prefix, *the]
        assert tokenizer.encode_prompt("") == prefix and tokenizer.encode_prompt("the", prefix=()) == the
        assert tokenizer.encode_prompt("the", prefix=(0,)) == [0, *the]
        text = SPECIAL_TOKENS["bos"] + "the"  # of a chat template
        assert tokenizer.encode_prompt(text, prefix=(0,)) == [0, *the] == tokenizer.encode_prompt(text, prefix=())
        whole = backend.encode("the <[MASK]>").ids
        quoted = tokenizer.encode("the <[MASK]>", add_special_tokens=True, parse_special_tokens=False)
        assert (
            5 in whole and 5 not in quoted and quoted[: len(prefix)] == prefix and (quoted[-1] == 2) == (whole[-1] == 2)
        )
    with pytest.raises(ValueError, match="--add-bos: this checkpoint has no bos token"):
        bos_prefix(True, None, "--add-bos")
    assert (bos_prefix(None, 3), bos_prefix(False, 3), bos_prefix(True, 3)) == (None, [], [3])


@pytest.mark.parametrize("model", [
    tokenizers.models.WordLevel({"<s>": 0, "b": 1, "c": 2}),
    tokenizers.models.BPE({"<s>": 0, "b": 1, "c": 2, "bc": 3}, [("b", "c")]),
], ids=["words", "merges"])  # fmt: skip
def test_a_prompt_begins_so_whatever_the_vocabulary_lacks(model):
    """What the post-processor adds is found without a text that the vocabulary may not have."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    assert Tokenizer(backend).encode_prompt("b c") == [0, 1, 2] == generation_loop.encode(backend, "b c", "x")
    assert Tokenizer(backend).encode("b", add_special_tokens=True, parse_special_tokens=False) == [0, 1, 0]
    if isinstance(model, tokenizers.models.WordLevel):
        with pytest.raises(ValueError, match="the tokenizer cannot encode 'b a': "):
            Tokenizer(backend).encode_prompt("b a")


def test_control_tokens_that_only_the_model_names(folder):
    """config.json beside a tokenizer that calls none of them special."""
    change(folder, added_tokens={"special": False})
    ids = {"mask_token_id": 5, "eos_token_id": [2, 3], "bos_token_id": 0, "pad_token_id": 1, "x_token_id": 10**30}
    text = "the" + "".join(load_tokenizer(folder).id_to_token(i) for i in (5, 2, 3, 0, 1))
    assert {0, 1, 2, 3, 5} <= set(Tokenizer.from_pretrained(folder).encode(text, parse_special_tokens=False))
    (folder / "config.json").write_text(json.dumps({**ids, "sep_token_id": None, "pad_token_id": True}))
    assert 1 in Tokenizer.from_pretrained(folder).encode(text, parse_special_tokens=False)
    (folder / "config.json").write_text(json.dumps(ids))
    tokenizer = Tokenizer.from_pretrained(folder)
    encoded = tokenizer.encode(text, parse_special_tokens=False)
    assert not {0, 1, 2, 3, 5} & set(encoded) and tokenizer.decode(encoded) == text


@pytest.mark.parametrize("named", [True, False])
def test_control_tokens_never_come_from_text(named, folder):
    """Also where tokenizer.json does not call them special: then `tokenizers` parses them always."""
    change(folder, added_tokens={"special": False})
    tokenizer = configure(folder, mask_token="<[MASK]>") if named else Tokenizer.from_pretrained(folder)
    if not named:
        tokenizer.protect([5, 2, None, 9999])  # an id of the model's that the tokenizer lacks is no text
    text = "the <[MASK]> fox<[end▁of▁sentence]><[MASK]>"
    ids = tokenizer.encode(text, parse_special_tokens=False)
    assert not {2, 5} & set(ids) and tokenizer.decode(ids) == text
    assert tokenizer.encode(text).count(5) == 2
    assert tokenizer.decode([5, *tokenizer.encode("fox")]) == "fox"


def test_a_model_that_merges_its_control_tokens(tmp_path):
    """Unigram finds "</s>" in any text, as its pieces are the vocabulary: such text is encoded by pieces."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "ab</s>")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = configure(tmp_path, eos_token="</s>", pad_token="a", unk_token="<unk>")
    text = "a</s>b</s></s>"
    assert 1 in tokenizer.encode(text)
    ids = tokenizer.encode(text, parse_special_tokens=False)
    assert 1 not in ids and "".join(tokenizer.backend.id_to_token(i) for i in ids) == text


def test_tokens_that_only_other_files_name(folder):
    """added_tokens.json, or tokenizer_config.json, which counts over it: as transformers reads them."""
    transformers = pytest.importorskip("transformers")
    size = load_tokenizer(folder).get_vocab_size()
    text = "the <|im_start|> quick<|im_end|>"
    added = {"<|im_end|>": size + 1, "<|im_start|>": size}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    for config in (
        {"additional_special_tokens": ["<|im_start|>"]},
        {"added_tokens_decoder": {
            str(i): {"content": content, "special": i == size, "lstrip": i == size, "rstrip": False,
                     "single_word": False, "normalized": False}
            for content, i in added.items()
        }},
    ):  # fmt: skip
        tokenizer = configure(folder, **config)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False) and {size, size + 1} <= set(ids)
        assert tokenizer.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True
        ) and "<|im_end|>" in tokenizer.decode(ids)
        assert (size in load_tokenizer(folder / "tokenizer.json").encode(text).ids) is True
    (folder / "added_tokens.json").write_text(json.dumps({"<[MASK]>": 7}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert configure(folder).encode("<[MASK]>") == [5] == theirs.encode("<[MASK]>", add_special_tokens=False)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 7}))
    with pytest.raises(
        ValueError, match=rf"added_tokens\.json gives '<\|im_end\|>' the id {size + 7}, .* free id is {size}"
    ):
        configure(folder)
    (folder / "added_tokens.json").unlink()
    assert configure(folder, extra_special_tokens={"image_token": "<i>"}).special_tokens["extra_special_tokens"] == [
        "<i>"
    ]


@pytest.mark.parametrize("file, values, said", [
    ("added_tokens.json", {"<x>": "y"}, ": <x> must be int, got 'y'"),
    ("added_tokens.json", {"<x>": None}, ": <x> must be int, got None"),
    ("added_tokens.json", {"<x>": -1}, ": <x> must not be negative, got -1"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": "x"}}, ": added_tokens_decoder.1 must be an object with keys"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"one": {}}}, ": added_tokens_decoder must name tokens by their ids, got 'one'"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, ": added_tokens_decoder.1 lacks content"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "x", "special": 1}}}, ": added_tokens_decoder.1: special must be bool"),
    ("tokenizer_config.json", {"eos_token": 3}, ": eos_token must be str, got 3"),
    ("special_tokens_map.json", {"mask_token": {"content": 5}}, ": mask_token: content must be str, got 5"),
    ("special_tokens_map.json", {"additional_special_tokens": ["a", 7]}, r": additional_special_tokens\[1\] must be str, got 7"),
    ("tokenizer_config.json", {"chat_template": {"a": "b"}}, ": chat_template must be text or a list"),
    ("tokenizer_config.json", {"chat_template": 7}, ": chat_template must be text or a list"),
    ("tokenizer_config.json", {"chat_template": [1]}, r": chat_template\[0\] must hold a JSON object, got int"),
    ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, r": chat_template\[0\] lacks template"),
    ("tokenizer.json", {"model": 3}, ": model must be an object with keys, got 3"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, ": model: vocab.a must not be negative, got -1"),
    ("tokenizer.json", {"added_tokens": [{"id": 0}]}, r": added_tokens\[0\] lacks content"),
    ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}}, "precompiled_charsmap is damaged"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "b("}, "behavior": "Isolated", "invert": False}}, "parenthesis"),
])  # fmt: skip
def test_files_of_other_types_are_errors_with_file_and_key(file, values, said, folder):
    """Of another type, and nested too deeply for Python."""
    path = folder / file
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**old, **values}))
    with pytest.raises(ValueError, match=rf"{file.replace('.', '[.]')}.*{said}"):
        Tokenizer.from_pretrained(folder)
    path.write_text('{"model": ' + "[" * 100000)
    with pytest.raises(ValueError, match=rf"{file.replace('.', '[.]')} is not JSON that can be read: it is nested"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("part, value", [
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    ("decoder", {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}], "pair": [], "special_tokens": {}}),
    ("post_processor", {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}),
])  # fmt: skip
def test_panics_of_the_library_are_errors(part, value, folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, part: value}))
    with pytest.raises(ValueError, match="the tokenizer('s post_processor fails| cannot|'s post_processor leaves)"):
        tokenizer = Tokenizer.from_pretrained(folder)
        tokenizer.encode_prompt("the quick")
        tokenizer.decode([tokenizer.token_to_id("a")])


@pytest.mark.parametrize("template", [LLAMA3, CHATML, BLOCKS, NO_SYSTEM])
def test_renders_as_transformers_does(template, folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = configure(folder, chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tools = {"tools": [{"type": "function", "function": {"name": "f", "description": "é <x>"}}]}
    for messages in (
        [USER],
        [USER, ASSISTANT, USER],
        [SYSTEM, USER],
        [USER, ASSISTANT],
        [USER, {**ASSISTANT, "content": "a"}],
    ):
        if messages[0] is SYSTEM and template in (BLOCKS, NO_SYSTEM):
            continue
        cases = [{"add_generation_prompt": True}, {"add_generation_prompt": False}]
        cases += [{"add_generation_prompt": True, "enable_thinking": False}, {"add_generation_prompt": True, **tools}]
        if messages[-1]["role"] == "assistant" and template is not BLOCKS:
            cases.append({"add_generation_prompt": False, "continue_final_message": True})
        for case in cases:
            want = theirs.apply_chat_template(messages, tokenize=False, **case)
            assert tokenizer.apply_chat_template(messages, **case) == want
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True)
        ids = ids if isinstance(ids, list) else ids["input_ids"]
        assert tokenizer.encode(tokenizer.apply_chat_template(messages)) == ids


def test_renders_without_transformers(folder):
    tokenizer = configure(folder, chat_template=LLAMA3)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    want = (
        SPECIAL_TOKENS["bos"] + head.format("user") + USER["content"].strip() + "<|eot_id|>" + head.format("assistant")
    )
    assert tokenizer.apply_chat_template([USER]) == want
    assert tokenizer.apply_chat_template([USER], bos_token="").startswith("<|start_header_id|>")
    go_on = tokenizer.apply_chat_template([USER, ASSISTANT], add_generation_prompt=False, continue_final_message=True)
    assert go_on == want + "It is"  # the template trims, so the space is not there to go on from
    blocks = render_chat_template(BLOCKS, [USER, ASSISTANT], bos_token="B", eos_token="E")
    assert (
        blocks.startswith('B What is 2 + 2? <b>&\n"It is \\n"E\n20')
        and '"a": "<é>"' in blocks
        and blocks.endswith("False")
    )
    kept = render_chat_template(
        "{% for m in messages %}{{ m.content }}#{% endfor %}",
        [ASSISTANT],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert kept == ASSISTANT["content"]


def test_system_message_moves_where_there_is_no_role_for_it(folder):
    tokenizer = configure(folder, chat_template=NO_SYSTEM)
    messages = [SYSTEM, {"role": "user", "content": "Hi"}, ASSISTANT, {"role": "user", "content": "Bye"}]
    want = f"{SPECIAL_TOKENS['bos']}user: Be brief.\n\nHi\nassistant: It is\nuser: Bye\nmodel: "
    assert tokenizer.apply_chat_template(messages) == want
    assert messages[1]["content"] == "Hi" and merge_system(messages)[0]["content"] == "Be brief.\n\nHi"
    # As the authors' evaluation has it: stripped, all of them, and a user's turn where none is first.
    hi, padded = {"role": "user", "content": "Hi"}, {"role": "system", "content": "\nBe brief.\n\n"}
    for given, contents in (
        ([padded, hi], ["Be brief.\n\nHi"]),
        ([padded, padded, hi], ["Be brief.\n\nBe brief.\n\nHi"]),
        ([SYSTEM, ASSISTANT, hi], ["Be brief.", ASSISTANT["content"], "Hi"]),
        ([SYSTEM, hi, padded], ["Be brief.\n\nBe brief.\n\nHi"]),
        ([SYSTEM], ["Be brief."]),
        ([hi], ["Hi"]),
    ):
        merged = merge_system(given)
        assert [m["content"] for m in merged] == contents and "system" not in {m["role"] for m in merged}
        head = f"{SPECIAL_TOKENS['bos']}user: {contents[0]}\n"
        assert tokenizer.apply_chat_template(given).startswith(head)
    parts = merge_system([SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    assert [part["text"] for part in parts[0]["content"]] == ["Be brief.\n\n", "Hi"]
    with pytest.raises(ValueError, match="refuses these messages: Only user and assistant roles"):
        render_chat_template(BLOCKS, [SYSTEM, USER])


def test_what_a_message_lacks_is_not_the_word_none(folder):
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.name is defined %}!{% endif %}\n{% endfor %}"
    tokenizer, messages = (
        configure(folder, chat_template=template),
        [USER, {"role": "assistant", "content": None, "name": None}],
    )
    assert tokenizer.apply_chat_template(messages).endswith("<b>&assistant:")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(messages) == theirs.apply_chat_template(messages, tokenize=False)
    with pytest.raises(ValueError, match="messages need a role"):
        tokenizer.apply_chat_template([{"role": None, "content": "x"}])
    asks = "{% for m in messages %}{% if m.content is none %}-{% else %}{{ m['content'].split()[0] }}{% endif %}{% endfor %}"
    assert render_chat_template(asks, messages) == "What-"
    absent = "{{ messages[0].x is none }} {{ x is none }} {{ messages[1].name is not none }} {{ none is none }}"
    assert render_chat_template(absent, messages) == "False False False True"
    assert render_chat_template("{{ messages[1].content | trim }}{{ messages[1]._none }}", messages) == ""


@pytest.mark.parametrize("template, want", [
    ("{% for m in messages %}{{ m.content }}#{{ m.content }}#{% endfor %}", "It is \n#It is \n"),
    ("{% for m in messages %}{{ m.content | trim }} #{{ m.content | trim }} #{% endfor %}", "It is #It is"),
    ("{{ messages[-1].content | trim }} {{ messages[-1].content }}#", "It is It is \n"),
])  # fmt: skip
def test_a_message_that_is_shown_twice_goes_on_once(template, want):
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render_chat_template(template, [ASSISTANT], **options) == want


def test_a_message_that_the_template_cuts_cannot_go_on():
    """As in transformers: the model would go on from something else than was given."""
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}#{% endfor %}"
    thought = {"role": "assistant", "content": "<think>so</think>It is"}
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render_chat_template(template, [ASSISTANT], **options) == ASSISTANT["content"]
    for messages in ([thought], [{"role": "user", "content": "<think>so</think>It is"}, thought]):
        with pytest.raises(ValueError, match="leaves the last message out, or a part of it: '<think>so</think>It is'"):
            render_chat_template(template, messages, **options)


def test_where_templates_come_from(folder):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "rag"},
    ]
    tokenizer = configure(folder, chat_template=named)
    assert tokenizer.apply_chat_template([USER]) == "plain"
    assert tokenizer.apply_chat_template([USER], tools=[{}]) == "tools"
    assert tokenizer.apply_chat_template([USER], tools=None) == "plain"
    assert tokenizer.apply_chat_template([USER], chat_template="rag") == "rag"
    assert tokenizer.apply_chat_template([USER], chat_template="{{ messages[0].role }}") == "user"
    with pytest.raises(ValueError, match="chat_template must name one of rag, tool_use: none of them is default"):
        configure(folder, chat_template=named[1:]).apply_chat_template([USER])
    (folder / "chat_template.jinja").write_text("from the file")
    alone = configure(folder, chat_template="from the config")
    assert (
        alone.apply_chat_template([USER])
        == "from the file"
        == alone.apply_chat_template([USER], chat_template="default")
    )
    with pytest.raises(
        ValueError, match="chat_template must be Jinja source or the name of a template, got 'rag'; .* default"
    ):
        alone.apply_chat_template([USER], chat_template="rag")
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("RAG {{ messages[0].content }}")
    (more / "tool_use.jinja").write_text("TOOLS")
    both = configure(folder, chat_template="from the config")
    assert both.apply_chat_template([USER], chat_template="rag") == "RAG " + USER["content"]
    assert (
        both.apply_chat_template([USER]) == "from the file" and both.apply_chat_template([USER], tools=[{}]) == "TOOLS"
    )
    (folder / "chat_template.jinja").unlink()
    assert configure(folder, chat_template="of it").apply_chat_template([USER]) == "of it"
    assert configure(folder, chat_template=named).apply_chat_template([USER], chat_template="rag").startswith("RAG")


def test_errors_name_the_file_and_the_cure(folder, tmp_path, monkeypatch):
    tokenizer = configure(folder)
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        tokenizer.apply_chat_template([USER])
    render = render_chat_template
    cases = [
        (lambda: render("\n{% if %}", [USER]), ValueError, "chat template is broken, line 2"),
        (lambda: render("{{ nothing.at.all }}", [USER]), ValueError, "fails on these messages: 'nothing' is undefined"),
        (lambda: render("{{ messages.append(1) }}", [USER]), ValueError, "fails on these messages: access to attribute 'append'"),
        (lambda: render("{{ ''.__class__.mro() }}", [USER]), ValueError, "access to attribute '__class__'"),
        (lambda: render("{{ messages[0].content + 1 }}", [USER]), ValueError, "fails on these messages: TypeError: "),
        (lambda: render("{{ 1 / 0 }}", [USER]), ValueError, "fails on these messages: ZeroDivisionError: "),
        (lambda: render("{{ raise_exception('a' * 9000) }}", [USER]), ValueError, "^.{,80}: a{500}$"),
        (lambda: render("{% break %}", [USER]), ValueError, "chat template is broken: 'break' outside loop"),
        (lambda: render("{{ " + "(" * 500 + ")" * 500 + " }}", [USER]), ValueError, "nested too deeply, or calls itself"),
        (lambda: render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [USER]), ValueError, "nested too deeply, or"),
        (lambda: render("x", [USER], tools=[lambda: 1]), ValueError, "must be plain data"),
        (lambda: render("x", USER), TypeError, "messages must be a list"),
        (lambda: render("x", "hello"), TypeError, "messages must be a list"),
        (lambda: render("x", [{"content": "x"}]), ValueError, "messages need a role"),
        (lambda: render("x", [USER], continue_final_message=True), ValueError, "exclude each other"),
        (lambda: render("x", [USER], add_generation_prompt=False, continue_final_message=True), ValueError, "leaves the last message out"),
        (lambda: render("x", [], add_generation_prompt=False, continue_final_message=True), ValueError, "needs a last message"),
    ]  # fmt: skip
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold a JSON object, got list"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text: it looks like UTF-16"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json lacks model"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.from_pretrained(folder)
    (folder / "vocab.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"has no tokenizer\.json; .* pip install transformers"):
        Tokenizer.from_pretrained(folder)


def test_missing_jinja(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="chat templates need jinja2: pip install jinja2"):
        render_chat_template("never seen before", [USER])


def test_tokenizers_that_only_transformers_can_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    units = [*alphabet, *(f"{letter}@@" for letter in alphabet), "<unk>", "the"]
    (tmp_path / "vocab.json").write_text(json.dumps({unit: i for i, unit in enumerate(units)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}')
    (tmp_path / "config.json").write_text('{"model_type": "ctrl"}')
    tokenizer, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("the fox") == theirs.encode("the fox", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    prompt = tokenizer.encode_prompt("the fox")
    assert prompt == theirs.encode("the fox") == generation_loop.encode(theirs, "the fox", "prompts[0]")
    assert tokenizer.special_token_id("unk_token") == tokenizer.token_to_id("<unk>") == units.index("<unk>")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="transformers cannot read the tokenizer in"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ [1] * 10**9 }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x\nx' | indent(1000000000) }}",
        "{{ [1] | batch(1000000000, 0) | list }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{% set ns = namespace(s='x') %}{% for _ in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for _ in range(40) %}{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for _ in range(40) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    ],
)
def test_templates_that_would_fill_the_memory(template):
    with pytest.raises(ValueError, match="the chat template fails on these messages: it needs more than 512 MiB"):
        render_chat_template(template, [USER])
    assert render_chat_template("{{ messages | length }}", [USER]) == "1"  # and the next one is rendered


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(s=[]) %}{% for _ in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        "{{ 9 ** (9 ** 9) }}",  # no signal handler of Python's would run within it
        "{% set ns = namespace(s=[], t=[]) %}{% for _ in range(60) %}{% set ns.s = [ns.s, ns.s] %}"
        "{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.s == ns.t }}",
    ],
)
def test_templates_that_would_not_end(template, monkeypatch):
    monkeypatch.setattr("illada.text.chat_template._MOST_SECONDS", 0.3)
    with pytest.raises(ValueError, match="the chat template fails on these messages: it does not end within 0.3 s"):
        render_chat_template(template, [USER])
    assert render_chat_template("{{ messages | length }}", [USER]) == "1"


def test_templates_that_make_too_long_a_text_and_what_only_looks_long():
    with pytest.raises(ValueError, match="the chat template refuses these messages: x+") as error:
        render_chat_template("{{ raise_exception('x' * 1000000) }}", [USER])
    assert len(str(error.value)) < 1000
    with pytest.raises(ValueError, match="it makes a text of 20000000 characters; at most 16777216 are allowed"):
        render_chat_template("{{ 'x' * 20000000 }}", [USER])
    for template, text in (
        ("{{ '**%s** 20240101, 100%% 1000000' % 'a' }}", "**a** 20240101, 100% 1000000"),
        (
            "{{ '**{}** 20240101 {:,}'.format('a', 20000000) }} {{ '{:>{}}'.format('b', 3) }}",
            "**a** 20240101 20,000,000   b",
        ),
        ("{{ '%s, 1000000' | format(2) }} {{ 'ab' * 3 }} {{ 2 ** 10 }} {{ 7 % 4 * 2 }}", "2, 1000000 ababab 1024 6"),
    ):
        assert render_chat_template(template, [USER]) == text


def test_templates_after_an_interrupt_a_killed_process_and_a_fork():
    """Each gets its own answer."""
    assert render_chat_template("{{ messages[0].content }}", [USER]) == USER["content"]
    first = chat_template._renderer._process
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template.pickle, "dump", mock.Mock(side_effect=KeyboardInterrupt))
        render_chat_template("one", [USER])
    assert render_chat_template("two", [USER]) == "two" and first.returncode == -signal.SIGKILL
    chat_template._renderer._process.kill()
    chat_template._renderer._process.wait()
    assert render_chat_template("three", [USER]) == "three"
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = int(render_chat_template("four", [USER]) != "four")
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert render_chat_template("five", [USER]) == "five"


def test_a_fork_while_another_thread_renders(monkeypatch):
    """Neither the lock nor half a request is copied."""
    monkeypatch.setattr("illada.text.chat_template._MOST_SECONDS", 0.5)
    render_chat_template("", [USER])
    began, ask = threading.Event(), chat_template.pickle.dump
    monkeypatch.setattr(chat_template.pickle, "dump", lambda *args: (ask(*args), began.set()))
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(render_chat_template, loop, [USER])
        assert began.wait(30)
        if (child := os.fork()) == 0:
            status = 1
            try:
                signal.alarm(30)
                status = int(render_chat_template("four", [USER]) != "four")
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(ValueError, match="it does not end within"):
            slow.result()


def test_templates_end_where_the_thread_that_asks_blocks_all_signals(monkeypatch):
    monkeypatch.setattr("illada.text.chat_template._MOST_SECONDS", 0.3)
    chat_template._renderer.stop()

    def too_long(*_):
        raise TimeoutError

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGALRM})
    handler = signal.signal(signal.SIGALRM, too_long)
    try:
        signal.alarm(30)
        with pytest.raises(ValueError, match="it does not end within 0.3 s"):
            render_chat_template("{{ 9 ** (9 ** 9) }}", [USER])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def test_variables_of_types_that_only_the_caller_has(monkeypatch):
    kind = type("Role", (str,), {"__module__": "__main__", "__qualname__": "Role"})
    monkeypatch.setattr(sys.modules["__main__"], "Role", kind, raising=False)
    with pytest.raises(ValueError, match="messages and variables of a chat template must be plain data: .*'Role'"):
        render_chat_template("{{ messages[0].role }}", [{"role": kind("user"), "content": ""}])
