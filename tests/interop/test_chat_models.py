"""Chat models of ``transformers``: stop tokens and chat templates, in and out.

The expected token ids, generated tokens and settings are those of ``transformers`` itself.
"""

import json
import random
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.loading import LoadedModel, build_model, load_checkpoint, load_model
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY
from lit_gpt_scratch.cli import convert
from lit_gpt_scratch.data import Conversations, Preferences, Prompts
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.interop.hf_checkpoint import PortableModel, read_hf_checkpoint, write_hf_checkpoint
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.tasks.rl.rollouts import generate_replies
from lit_gpt_scratch.text.chat_template import ChatTemplate, ImportedChatTemplate, Message, load_chat_template
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.interop.chat_models import LLAMA3_TEMPLATE, MODELS, SYSTEM, TALK
from tests.interop.chat_models import chat_model as chat_model  # a fixture
from tests.interop.conftest import library
from tests.mutations import mutate_json


def messages(talk: list[dict[str, str]]) -> list[Message]:
    return [Message(**each) for each in talk]  # type: ignore[arg-type]  # the roles are known


every_model = pytest.mark.parametrize("chat_model", MODELS, indirect=True)


def change(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file; ``...`` removes one."""
    values = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({n: v for n, v in values.items() if v is not ...}), encoding="utf-8")


def settings(folder: Path, file: str) -> Any:
    return json.loads((folder / file).read_text(encoding="utf-8"))


@every_model
@pytest.mark.parametrize("system", [False, True])
def test_prompts_have_the_ids_of_transformers(chat_model: Path, system: bool) -> None:
    reference = library().AutoTokenizer.from_pretrained(chat_model)
    template = load_chat_template(read_hf_checkpoint(chat_model).tokenizer)
    if system and "[INST]" in reference.chat_template:
        with pytest.raises(UserError, match="rejects the messages: Conversation roles must alternate"):
            template.render_prompt(messages([SYSTEM, TALK[0]]))
        return
    for n in (1, 3):
        talk = [SYSTEM] * system + TALK[:n]
        expected = reference.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert template.render_prompt(messages(talk)) == expected


@every_model
def test_the_loss_mask_is_that_of_transformers(chat_model: Path) -> None:
    """All tokens up to the end of the last reply; ``transformers`` includes the line break after it."""
    reference = library().AutoTokenizer.from_pretrained(chat_model)
    tokenizer = read_hf_checkpoint(chat_model).tokenizer
    template, talk = load_chat_template(tokenizer), TALK
    if "<|return|>" in reference.chat_template:  # earlier replies end with another token than the last one
        with pytest.raises(UserError, match="does not end message 4 with a token that ends generation"):
            template.render(messages(TALK))
        talk = TALK[2:]
    ids, loss_mask = template.render(messages(talk))
    expected = reference.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == expected["input_ids"][: len(ids)]
    assert loss_mask == [bool(learned) for learned in expected["assistant_masks"][: len(ids)]]
    assert not any(expected["assistant_masks"][len(ids) :])
    assert ids[-1] in tokenizer.stop_ids
    assert sum(loss_mask) > 10


@every_model
@pytest.mark.parametrize("mark", ["", "\ue000", "\ue0000\ue000", "\ue0001\ue000"])
def test_messages_contain_no_special_tokens(chat_model: Path, mark: str) -> None:
    reference = library().AutoTokenizer.from_pretrained(chat_model)
    tokenizer = read_hf_checkpoint(chat_model).tokenizer
    template = load_chat_template(tokenizer)
    names = "".join(tokenizer.special_tokens)
    ids = template.render_prompt(messages([{"role": "user", "content": f"a {names} b{mark}"}]))
    without = template.render_prompt(messages([{"role": "user", "content": "a b"}]))
    special = set(tokenizer.special_tokens.values()) - {tokenizer.unknown_id}
    assert [id_ for id_ in ids if id_ in special] == [id_ for id_ in without if id_ in special]
    if "[INST]" not in reference.chat_template:  # SentencePiece: another space after each name
        assert f"a {names} b{mark}" in tokenizer.decode(ids)
    if not mark and "[INST]" not in reference.chat_template:
        talk = [{"role": "user", "content": f"a {names} b"}]
        expected = reference.apply_chat_template(
            talk, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
        assert ids == expected


@every_model
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_settings_survive_a_round_trip(chat_model: Path, tmp_path: Path, suffix: str) -> None:
    transformers = library()
    convert.main(["from-hf", str(chat_model), str(tmp_path / f"m.{suffix}")])
    convert.main(["to-hf", str(tmp_path / f"m.{suffix}"), str(tmp_path / "again")])
    again = tmp_path / "again"
    for name in ("bos_token_id", "eos_token_id"):
        assert settings(again, "config.json")[name] == settings(chat_model, "config.json")[name]
    assert settings(again, "generation_config.json") == settings(chat_model, "generation_config.json")
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (chat_model, again))
    assert after.chat_template == before.chat_template
    assert after.special_tokens_map == before.special_tokens_map
    assert after.apply_chat_template(TALK, return_dict=False) == before.apply_chat_template(TALK, return_dict=False)
    generation = transformers.AutoModelForCausalLM.from_pretrained(again).generation_config
    assert generation.to_dict() == transformers.GenerationConfig.from_pretrained(chat_model).to_dict()
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)


def test_generation_stops_at_each_of_the_tokens(chat_model: Path) -> None:
    """Greedy decoding with ``transformers``, for several lists of ids that end it."""
    transformers = library()
    prompt = load_chat_template(read_hf_checkpoint(chat_model).tokenizer).render_prompt(messages(TALK[:1]))
    reference = transformers.AutoModelForCausalLM.from_pretrained(chat_model).eval()

    def theirs() -> list[int]:
        config = transformers.GenerationConfig.from_pretrained(chat_model)
        written = reference.generate(
            torch.tensor([prompt]), generation_config=config, do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        return written[0, len(prompt) :].tolist()

    free = theirs()
    assert len(free) == 24
    for ends in ([free[9], free[4]], [free[9]], free[7], [400, free[12]]):
        change(chat_model / "generation_config.json", eos_token_id=ends)
        loaded, tokenizer = load_model(chat_model)
        replies = generate(loaded, [prompt], 24, Sampling(temperature=0), [0], tokenizer.stop_ids)
        ours = [token for _, token in replies if token is not None]
        expected = theirs()
        assert expected[-1] in (ends if isinstance(ends, list) else [ends])
        assert ours == expected[:-1]
        # Reinforcement learning also learns the token that ends the reply.
        rollouts = generate_replies(loaded, [prompt] * 3, 24, 1e-9, [0, 1, 2], tokenizer.stop_ids, 2)
        assert rollouts == [expected] * 3


EOT, END = "<|eot_id|>", "<|end_of_text|>"


@pytest.mark.parametrize(
    ("generation", "config", "named", "expected"),
    [
        ([END, EOT], END, EOT, {END, EOT}),
        (EOT, END, END, {EOT, END}),
        (None, EOT, END, {EOT, END}),
        (..., EOT, END, {EOT, END}),
        (..., None, EOT, {EOT, END}),
        (None, [EOT, "<|start_header_id|>"], END, {EOT, "<|start_header_id|>", END}),
        (["<|start_header_id|>"], EOT, EOT, {"<|start_header_id|>", END}),
        ([], EOT, END, {EOT, END}),
        (..., None, ..., {END}),
    ],
)
def test_the_generation_config_comes_first(
    chat_model: Path, generation: Any, config: Any, named: Any, expected: set[str]
) -> None:
    """Then the config, then the end-of-text token of the tokenizer; the end of a document always ends a text."""
    known = read_hf_checkpoint(chat_model).tokenizer.special_tokens

    def ids(names: Any) -> Any:
        return [known[name] for name in names] if isinstance(names, list) else known.get(names, names)

    if generation is ...:
        (chat_model / "generation_config.json").unlink()
    else:
        change(chat_model / "generation_config.json", eos_token_id=ids(generation))
    change(chat_model / "config.json", eos_token_id=ids(config))
    change(chat_model / "tokenizer_config.json", eos_token=named)
    assert read_hf_checkpoint(chat_model).tokenizer.stop_ids == {known[name] for name in expected}


def test_a_tokenizer_without_a_known_end_of_text(chat_model: Path) -> None:
    text = (chat_model / "tokenizer.json").read_text(encoding="utf-8")
    for name in (END, EOT):
        text = text.replace(name, f"<|my{name[2:]}")
    (chat_model / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer = read_hf_checkpoint(chat_model).tokenizer
    assert tokenizer.end_of_text == settings(chat_model, "generation_config.json")["eos_token_id"][0]
    with pytest.raises(UserError, match="no end-of-text token"):
        Tokenizer.load(chat_model)


@pytest.mark.parametrize("place", ["jinja", "string", "list", "object tokens"])
def test_places_of_the_template(chat_model: Path, place: str) -> None:
    path, tokens = chat_model / "chat_template.jinja", chat_model / "tokenizer_config.json"
    template = path.read_text(encoding="utf-8")
    if place in ("string", "list"):
        path.unlink()
        named = [{"name": "tool_use", "template": "none"}, {"name": "default", "template": template}]
        change(tokens, chat_template=template if place == "string" else named)
    if place == "object tokens":
        change(tokens, bos_token={"__type": "AddedToken", "content": "<|begin_of_text|>", "special": True})
    else:
        change(tokens, bos_token="<|begin_of_text|>")
    reference = library().AutoTokenizer.from_pretrained(chat_model)
    expected = reference.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
    tokenizer = read_hf_checkpoint(chat_model).tokenizer
    assert load_chat_template(tokenizer).render_prompt(messages(TALK[:1])) == expected


def test_without_a_default_template_that_of_this_package_is_used(
    chat_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (chat_model / "chat_template.jinja").unlink()
    change(chat_model / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "x"}])
    with caplog.at_level("WARNING", "lit_gpt_scratch"):
        tokenizer = read_hf_checkpoint(chat_model).tokenizer
    assert "no chat template named default" in caplog.text
    assert "these chat templates are not imported: tool_use" in caplog.text
    assert type(load_chat_template(tokenizer)) is ChatTemplate


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"eos_token_id": "2"}, "config.json: eos_token_id is '2'; it must be an integer or a list"),
        ("config.json", {"eos_token_id": [1, None]}, r"eos_token_id\[1\] is null"),
        ("generation_config.json", {"eos_token_id": {"a": 1}}, "generation_config.json: eos_token_id is an object"),
        ("tokenizer_config.json", {"eos_token": 3}, "tokenizer_config.json: eos_token is 3; it must be text"),
        ("tokenizer_config.json", {"chat_template": 3}, "tokenizer_config.json: chat_template is 3"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "has no field template"),
    ],
)
def test_fields_of_another_type(chat_model: Path, file: str, fields: dict[str, Any], message: str) -> None:
    change(chat_model / file, **fields)
    with pytest.raises(UserError, match=message) as error:
        read_hf_checkpoint(chat_model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_damaged_files(chat_model: Path, file: str, text: str) -> None:
    (chat_model / file).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=file):
        read_hf_checkpoint(chat_model)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "config.json"])
def test_a_checkpoint_can_store_all_that_is_imported(chat_model: Path, tmp_path: Path, file: str) -> None:
    change(chat_model / "tokenizer_config.json", chat_template=LLAMA3_TEMPLATE, bos_token={"content": "<|eot_id|>"})
    (chat_model / "chat_template.jinja").unlink()
    whole, imported = settings(chat_model, file), 0
    for seed in range(20):
        mutated = mutate_json(whole, random.Random(seed))
        (chat_model / file).write_text(json.dumps(mutated), encoding="utf-8")
        try:
            checkpoint = load_checkpoint(chat_model)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - many mutations are accepted
            continue
        imported += 1
        loaded = build_model(checkpoint, chat_model)
        again = write_hf_checkpoint(portable(loaded), tmp_path / f"again{seed}")
        assert again == "LlamaForCausalLM"
        with suppress(UserError):
            load_chat_template(loaded.tokenizer).render(messages(TALK))
    assert 0 < imported < 20


def portable(loaded: LoadedModel) -> PortableModel:
    shape = ModelShape(loaded.net.config, loaded.net.vocab_size, loaded.net.block_size)
    return PortableModel(shape, loaded.net.state_dict(), loaded.tokenizer)


def test_nested_settings_are_not_kept(chat_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(
        chat_model / "generation_config.json", watermarking={"a": {}}, suppress_tokens=[1, 2], deep=[[1]], big=10**30
    )
    with caplog.at_level("WARNING", "lit_gpt_scratch"):
        published = read_hf_checkpoint(chat_model).tokenizer.published
    assert "generation_config.json: these fields are not imported: big, deep, watermarking" in caplog.text
    assert published is not None
    assert published.generation_config is not None
    assert published.generation_config["suppress_tokens"] == [1, 2]
    assert published.generation_config.keys().isdisjoint({"watermarking", "deep", "big"})


def test_templates_that_are_unreadable_or_too_long(chat_model: Path) -> None:
    path = chat_model / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja cannot be read"):
        read_hf_checkpoint(chat_model)
    path.write_text("x" * 300_000, encoding="utf-8")
    with pytest.raises(UserError, match=r"chat_template\.jinja has more than 262,144 characters"):
        read_hf_checkpoint(chat_model)


def test_checkpoints_without_these_settings_load(chat_model: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(chat_model)
    del checkpoint[METADATA_KEY]["published"]
    save_checkpoint(checkpoint, tmp_path / "old.ckpt")
    _, tokenizer = load_model(tmp_path / "old.ckpt")
    assert tokenizer.stop_ids == {tokenizer.end_of_text}
    assert type(load_chat_template(tokenizer)) is ChatTemplate


@pytest.mark.parametrize(
    "published",
    [3, {"eos_token_id": "x"}, {"tokens": {"a": 1}}, {"chat_template": 3}, {"generation_config": {"a": {}}}],
)
def test_damaged_metadata(chat_model: Path, tmp_path: Path, published: Any) -> None:
    checkpoint = load_checkpoint(chat_model)
    checkpoint[METADATA_KEY]["published"] = published
    save_checkpoint(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(UserError, match=r"the checkpoint is corrupted \(metadata\.published"):
        load_model(tmp_path / "damaged.ckpt")


THOUGHT = r"\s*(<think>\s*</think>\s*|<\|channel\|>final<\|message\|>)?"
"""What the templates of Qwen3 and gpt-oss put before the last reply."""


@every_model
def test_fine_tuning_uses_the_template_of_the_model(chat_model: Path, tmp_path: Path) -> None:
    """In each kind of data; its labels are the replies with the tokens that end them."""
    reference = library().AutoTokenizer.from_pretrained(chat_model)
    eos = settings(chat_model, "tokenizer_config.json")["eos_token"]
    rows = tmp_path / "rows.jsonl"
    columns = {"prompt": "the cat", "instruction": "a dog", "output": "sees", "chosen": "a", "rejected": "b"}
    numbered = [{name: f"{text} {n}" for name, text in columns.items()} for n in range(30)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in numbered), encoding="utf-8")
    common = {"source": str(rows), "init_from": str(chat_model), "block_size": 128, "cache": str(tmp_path)}
    (sequence,) = Conversations(**common).examples["train"][0].sequences
    learned = [label for label in sequence.labels.tolist() if label != -100]
    assert re.fullmatch(rf"{THOUGHT}sees \d+{re.escape(eos)}", reference.decode(learned))
    assert sequence.label_bytes is not None
    text = re.search(r"sees \d+", reference.decode(learned))
    assert text is not None
    assert sequence.label_bytes.sum() == len(text[0].encode())
    pair = Preferences(**common).examples["train"][0].sequences
    for side, sequence in zip("ab", pair, strict=True):
        learned = [label for label in sequence.labels.tolist() if label != -100]
        assert re.fullmatch(rf"{THOUGHT}{side} \d+{re.escape(eos)}", reference.decode(learned))
    data = Prompts(**common, reply_tokens=8)
    ids, (prompt,) = data.lookup_prompts("train", [0])
    talk = [{"role": "user", "content": prompt}]
    assert ids == [reference.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)]
    assert isinstance(data.template, ImportedChatTemplate)
    assert data.tokenizer.published is not None
    assert asdict(data.tokenizer.published)["chat_template"] == reference.chat_template


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LLAMA3_TEMPLATE.replace("<|eot_id|>", "."), "does not end message 2 with a token that ends generation"),
        (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}<|eot_id|>{% endif %}{% endfor %}",
            "does not end message 2 with a token that ends generation",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}",
            "renders the messages before message 2 differently if a reply follows them",
        ),
        ("{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}", "rejects the messages: no"),
        ("{{ messages[9].content }}", "cannot be used: .*has no element 9"),
    ],
)
def test_templates_that_cannot_be_trained_on(chat_model: Path, tmp_path: Path, template: str, message: str) -> None:
    (chat_model / "chat_template.jinja").write_text(template, encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    row = {"messages": TALK}
    rows.write_text(f"{json.dumps(row)}\n" * 30, encoding="utf-8")
    data = Conversations(source=str(rows), init_from=str(chat_model), block_size=256, cache=str(tmp_path))
    with pytest.raises(UserError, match=rf"rows\.jsonl.*line \d+.*{message}") as error:
        _ = data.examples
    assert "\n" not in str(error.value)
