"""Small chat models with random weights, saved by ``transformers`` with published chat templates."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from lit_gpt_scratch.text.tokenizer_training import train_tokenizer
from tests import tokenizer_forms
from tests.conftest import sentences
from tests.interop.conftest import GPT_OSS, LLAMA, library, randomised

# As published with Llama 3, Qwen2.5, Qwen3 (without tools), Llama 2 and gpt-oss (shortened), with the marks for replies
# from which ``transformers`` computes the loss mask.
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}"
    "{% if loop.index0 == 0 %}{% set header = bos_token + header %}{% endif %}{{ header }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3_TEMPLATE = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
GPT_OSS_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|start|>assistant' }}"
    "{% generation %}{{ '<|channel|>final<|message|>' + message.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>"]
GPT_OSS_TOKENS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"]


def bpe(end_of_text: str, special: list[str]) -> Backend:
    """A small tokenizer with the special tokens of a published one."""
    trained = train_tokenizer("bpe", [sentences(seed) for seed in range(5)], 300, special).to_str()
    return Backend.from_str(trained.replace("<|endoftext|>", end_of_text))


def llama3() -> Backend:
    """A tokenizer that also adds the start of a text, which a chat template must not repeat."""
    backend = bpe("<|end_of_text|>", LLAMA3_TOKENS)
    start = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, backend.token_to_id(start))]
    )
    return backend


# Tokenizer, template, tokens of tokenizer_config.json, tokens that end replies in generation_config.json.
MODELS: dict[str, tuple[Any, str, dict[str, str], list[str]]] = {
    "llama3": (
        llama3, LLAMA3_TEMPLATE,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, ["<|end_of_text|>", "<|eot_id|>"],
    ),
    "qwen": (
        lambda: bpe("<|endoftext|>", QWEN_TOKENS), QWEN_TEMPLATE,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, ["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen3": (
        lambda: bpe("<|endoftext|>", QWEN_TOKENS), QWEN3_TEMPLATE,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, ["<|im_end|>", "<|endoftext|>"],
    ),
    "gpt_oss": (
        lambda: bpe("<|endoftext|>", GPT_OSS_TOKENS), GPT_OSS_TEMPLATE,
        {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"}, ["<|return|>", "<|endoftext|>", "<|call|>"],
    ),
    "llama2": (
        lambda: tokenizer_forms.llama2(False), LLAMA2_TEMPLATE,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, ["</s>"],
    ),
    "llama2, metaspace": (
        lambda: tokenizer_forms.llama2(True), LLAMA2_TEMPLATE,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, ["</s>"],
    ),
}  # fmt: skip
TALK = [
    {"role": "user", "content": " the cat sees\n\na dog, é 東京 🎉 "},
    {"role": "assistant", "content": "every bird likes"},
    {"role": "user", "content": "\nsome fish"},
    {"role": "assistant", "content": "the cat \n chases a dog."},
]
SYSTEM = {"role": "system", "content": "the cat."}


@pytest.fixture
def chat_model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small chat model with random weights, saved by ``transformers``."""
    transformers = library()
    build, template, tokens, ends = MODELS[getattr(request, "param", "llama3")]
    backend = build()
    end_ids = [backend.token_to_id(end) for end in ends]
    start = backend.token_to_id(tokens.get("bos_token", ends[0]))
    settings, model_class = LLAMA, transformers.LlamaForCausalLM
    if "<|im_end|>" in ends:
        model_class = transformers.Qwen3ForCausalLM
    elif "<|return|>" in ends:
        settings, model_class = GPT_OSS, transformers.GptOssForCausalLM
    config = settings | {
        "vocab_size": 448,
        "bos_token_id": start,
        "eos_token_id": end_ids[0],
        "max_position_embeddings": 256,
    }
    model = randomised(model_class(model_class.config_class(**config)))
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=start,
        eos_token_id=end_ids if len(end_ids) > 1 else end_ids[0],
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    folder = tmp_path / "chat"
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens).save_pretrained(
        folder
    )
    return folder
