"""A tokenizer read without transformers is the one that transformers reads, or is left to transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from deployments.runtime.plain_tokenizer import read_tokenizer
from deployments.runtime.sandbox import compile_template
from tests.support.tiny_tokenizer import EOS_ID, byte_level_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer

TEXTS = (
    "",
    " ",
    "hello world",
    "  hello\n\n world's  ",
    "<|end|>hello<|pad|> <|tag 世|>",
    "Café 世界 😀 1234",
    "HELLO, worlds. lovely\tCAFÉ",
    "<s> a ▁ </s>",
    "[CLS] hello [MASK][SEP]",
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be <brief> & 'kind'"},
    {"role": "user", "content": "what is 世?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, "é"]}}}]},
    {"role": "user", "content": "thanks"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "b": "<é>"}}}]


def qwen2() -> PreTrainedTokenizerBase:
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"he": 256, "ll": 257, "hell": 258, "<|endoftext|>": 259, "<|im_end|>": 260}
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, bos_token="<|im_end|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def bert() -> PreTrainedTokenizerBase:
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "cafe", ",", ".", "love", "##ly")
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)


def with_two_templates() -> PreTrainedTokenizerBase:
    return byte_level_tokenizer(chat_template={"default": CHATML, "tool_use": "{{ tools | tojson }}"})


BUILDERS = (
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    wordpiece_tokenizer,
    qwen2,
    bert,
    with_two_templates,
)


def save(tokenizer: PreTrainedTokenizerBase, directory: Path, model_type: str = "llama", **config: object) -> None:
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_it_encodes_and_decodes_as_transformers_does(build, add_special_tokens: bool, tmp_path: Path) -> None:
    save(build(), tmp_path)
    plain, reference = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert plain is not None
    assert plain.eos_token_id == reference.eos_token_id
    assert plain.chat_template == reference.chat_template
    for text in TEXTS:
        ids = plain.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        assert ids == reference.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            ours = plain.backend_tokenizer.decode(ids, skip_special_tokens=skip)
            assert ours == reference.backend_tokenizer.decode(ids, skip_special_tokens=skip)


def test_begin_and_end_tokens_are_put_by_the_file_alone(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    for backend_ends in (False, True):
        if backend_ends:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<|pad|> $A <|end|>", special_tokens=[("<|pad|>", 1), ("<|end|>", EOS_ID)]
            )
        save(tokenizer, tmp_path, bos_token="<|pad|>", add_bos_token=True, add_eos_token=True)
        plain = read_tokenizer(tmp_path)
        assert plain is not None
        ids = plain.backend_tokenizer.encode("hello").ids
        assert ids == AutoTokenizer.from_pretrained(tmp_path).encode("hello")
        assert (ids[0] == 1) == (ids[-1] == EOS_ID) == backend_ends


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"auto_map": {"AutoTokenizer": ["a.B", None]}},
        {"added_tokens_decoder": {"0": {"content": "<|end|>", "special": False}}},
        {"added_tokens_decoder": {"9000": {"content": "<|new|>", "special": True}}},
        {"additional_special_tokens": ["<|new|>"]},
        {"image_token": "<|end|>"},
        {"pad_token": "<|nowhere|>"},
        {"split_special_tokens": True},
    ],
)
def test_what_the_file_does_not_say_is_left_to_transformers(change: dict[str, object], tmp_path: Path) -> None:
    save(byte_level_tokenizer(), tmp_path)
    assert read_tokenizer(tmp_path) is not None
    save(byte_level_tokenizer(), tmp_path, **change)
    assert read_tokenizer(tmp_path) is None


def test_a_class_that_would_build_something_else_is_left_to_transformers(tmp_path: Path) -> None:
    for build, part, value in (
        (qwen2, "normalizer", None),
        (
            qwen2,
            "pre_tokenizer",
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ),
        (bert, "normalizer", {"type": "Lowercase"}),
        (bert, "pre_tokenizer", {"type": "Whitespace"}),
    ):
        save(build(), tmp_path)
        assert read_tokenizer(tmp_path) is not None
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
        assert read_tokenizer(tmp_path) is None, (build, part)
    save(byte_level_tokenizer(), tmp_path, model_type="qwen2")
    assert read_tokenizer(tmp_path) is None, "transformers takes Qwen2's class, whatever the checkpoint names"


TEMPLATES = {
    "chatml": CHATML,
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{{ tools[0] | tojson(separators=(',', ':')) }}{% endif %}",
    "calls": "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}{{ dict(a=1).a }}{{ dict.fromkeys(['x']) }}",
    "generation": "{% for m in messages %}  {% generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "white space": "  {% for m in messages %}\n    {%- if true %}\n  {{ m.content }}\n"
    "    {% endif %}\n  {% endfor %}\n",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ messages | length }}",
    "filters": "{{ messages[0].content | trim | upper }}{{ messages | map(attribute='role') | join(',') }}"
    "{{ messages[0] | items | list }}{{ 'a b'.split() }}",
    "documents": "{{ documents is none }}{{ documents is defined }}{{ tools is none }}",
    "year": "{{ strftime_now('%Y') }}",
    "raises": "{{ raise_exception('no ' + messages[0].role) }}",
    "sandbox": "{{ messages.append(1) }}",
    "escape": "{{ ''.__class__.__mro__ }}",
    "private": "{% set ns = namespace(__class__=1) %}",
    "no template": "{% if %}",
}


def outcome(tokenizer: Any, options: dict[str, Any]) -> str | type[TemplateError]:
    """What is rendered, or the kind of error."""
    try:
        return tokenizer.apply_chat_template(MESSAGES, **options)
    except TemplateError as error:
        return type(error)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_render_as_transformers_renders_them(
    name: str, tools: list[dict[str, Any]] | None, tmp_path
) -> None:
    tokenizer = byte_level_tokenizer(chat_template=TEMPLATES[name])
    save(tokenizer, tmp_path)
    plain = read_tokenizer(tmp_path)
    assert plain is not None
    for add_generation_prompt in (True, False):
        options = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        assert outcome(plain, options) == outcome(tokenizer, options)


def test_of_several_templates_the_one_for_tools_is_taken_with_tools_alone(tmp_path: Path) -> None:
    save(with_two_templates(), tmp_path)
    plain, reference = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert plain is not None
    for tools in (None, TOOLS):
        options = {"tools": tools, "tokenize": False, "add_generation_prompt": True}
        assert plain.apply_chat_template(MESSAGES, **options) == reference.apply_chat_template(MESSAGES, **options)


def test_a_template_changes_nothing_that_it_is_given() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(TemplateError):
        compile_template("{{ messages[0].update(role='system') }}")(messages=messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_reading_it_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    save(byte_level_tokenizer(), tmp_path)
    script = (
        "import sys; from pathlib import Path; from deployments.replica.text import TextTokenizer;"
        f"TextTokenizer.load(Path({str(tmp_path)!r}));"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
