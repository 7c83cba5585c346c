"""The embedded VLM's architecture: a tiny Idefics3 with its own tokenizer.

Idefics3 is used because its processor needs no torchvision: a ViT of 16-pixel patches, a pixel shuffle that packs
64 patches into 4 image tokens, and a Qwen3 language side. The tokenizer is a byte-level BPE in which every word of the
prompts is one token and every value -1.00 ... 1.00 is one token, so an answer of A numbers takes 2A + 2 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from covr_lightning.vlm.embedded.frames import IMAGE_SIZE

VALUE_COUNT = 201
MAX_VOCABULARY = 2048
SPECIAL_TOKENS = (
    "<pad>",
    "<bos>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    "<system>",
    "<user>",
    "<assistant>",
)
PATCH_SIZE = 16
SHUFFLE_FACTOR = 4
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // SHUFFLE_FACTOR) ** 2
TEXT_WIDTH = 192

_PIECES = r"action:\[|, | ?\[-1, 1\]| ?(?!action:\[)[A-Za-z_]+|[0-9]| ?[^\sA-Za-z0-9_]+|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def value_texts() -> list[str]:
    """The 201 values that have a token of their own, "-1.00" to "1.00"; zero is "0.00"."""
    return [f"{step / 100:.2f}" if step else "0.00" for step in range(-100, 101)]


def build_tokenizer(corpus: Iterable[str]) -> Any:
    """Trains the byte-level BPE on the prompts and adds value and control tokens.

    Any text stays tokenisable, byte by byte if need be; the first value token's id is that of "-1.00" and the
    others follow in order.

    Args:
        corpus: texts whose words become single tokens.

    Returns:
        A `PreTrainedTokenizerFast` that pads on the left and ends a turn with `<end_of_utterance>`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(list(corpus), trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(text, normalized=False, special=False) for text in value_texts()])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: Any) -> Any:
    """An Idefics3 processor: any square picture to 128 x 128, no image splitting, 4 image tokens."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    edge = {"longest_edge": IMAGE_SIZE}
    image_processor = Idefics3ImageProcessorPil(
        size=edge, max_image_size=edge, do_image_splitting=False, resample=3, return_row_col_info=True
    )
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: Any) -> Any:
    """A freshly initialised Idefics3 of about 4 M parameters; seed torch's global generator before the call.

    The output layer is not tied to the embedding, so a LoRA on `lm_head` merges correctly.
    """
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Idefics3Config(
        text_config={
            "model_type": "qwen3",
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": TEXT_WIDTH // 4,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            **token_ids,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        scale_factor=SHUFFLE_FACTOR,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        **token_ids,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.do_sample = False
    for name, value in token_ids.items():
        setattr(model.generation_config, name, value)
    return model
