#!/usr/bin/env python3
"""Two tokenizers of 512 entries with golden encodings: writes fixtures/tokenizer/bpe and fixtures/tokenizer/spm.

bpe  the shape of Llama 3's tokenizer.json, which BitNet b1.58 2B-4T uses: byte-level BPE, `ignore_merges`,
     specials last.
spm  the shape of Llama 2's, which the 1bitLLM checkpoints use: SentencePiece BPE with byte fallback.

Each folder gets tokenizer.json, tokenizer_config.json, goldens.json (encodings by the Python `tokenizers` library;
for spm they are held against the `sentencepiece` library here), and gguf.json (the same vocabulary as llama.cpp's
converter puts it into GGUF metadata). bpe also gets chat.json (conversations rendered by transformers) and
generation_config.json. The vocabularies are learned from tokenizer_corpus.txt.

Needs: the environment of README.md in this folder.  Call: python scripts/oracles/tokenizer_fixtures.py [FOLDER]
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import sentencepiece
import tokenizers
import transformers
from tokenizer_strings import CONVERSATIONS, SPECIAL_STRINGS, STRINGS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "fixtures/tokenizer")
CORPUS = Path(__file__).parent / "tokenizer_corpus.txt"
ENTRIES = 512

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
# An added token that is not special: decoders keep it, and GGUF calls it user defined.
NOTE = "<|note|>"
# Entries that no merge leads to. `ignore_merges` finds them all the same when they are a whole word.
UNMERGED = ["Hello", " BitNet", " Привет", "你好", "🙂", "123"]
# `chat_template` of microsoft/bitnet-b1.58-2B-4T. The tokenizer, not the template, adds the first token.
BITNET_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# Other templates that a template engine should get right: Llama 3's; one that refuses; one with methods of Python
# strings, a namespace, trimmed blocks and negative indexes.
OTHER_TEMPLATES = {
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "strict": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system message, please') }}{% endif %}"
    "{{ message['role'].upper() + '> ' + message['content'].strip() + eos_token }}{% endfor %}",
    "pythonic": "{%- set ns = namespace(turns=0) -%}\n{%- for m in messages -%}\n    {%- if m.role == 'user' -%}"
    "{%- set ns.turns = ns.turns + 1 -%}{%- endif %}\n"
    "[{{ m.role.title() }}{% if not loop.last %} {{ loop.index }}/{{ messages | length }}{% endif %}] "
    "{{ m.content.strip().replace('\\n', ' ')[:40] }}\n{%- endfor %}\n{{ ns.turns }} turns; last by "
    "{{ messages[-1]['role'] }}\n{% if add_generation_prompt is defined and add_generation_prompt %}>{% endif %}",
}


def dump(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def dump_lines(path, value):
    """One array item a line, and ASCII only: some of the strings would not survive an editor."""
    parts = []
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], dict):
            body = "[\n  " + ",\n  ".join(json.dumps(i) for i in item) + "\n ]"
        else:
            body = json.dumps(item)
        parts.append(f" {json.dumps(key)}: {body}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def added(id, content, special=True):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content} | flags | {"special": special}


def template(bos, id):
    """The post-processor that puts `bos` before a text, and before each of a pair."""
    special = [{"SpecialToken": {"id": bos, "type_id": t}} for t in (0, 1)]
    sequence = [{"Sequence": {"id": name, "type_id": t}} for t, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [special[0], sequence[0]],
        "pair": [special[0], sequence[0], special[1], sequence[1]],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }


def goldens(tokenizer, names, extra_decodes):
    """Encodings and decodings of all strings."""

    def decodings(ids):
        return {
            "decoded": tokenizer.decode(ids, skip_special_tokens=False),
            "decoded_without_special": tokenizer.decode(ids, skip_special_tokens=True),
        }

    def case(text):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        with_special = tokenizer.encode(text, add_special_tokens=True).ids
        return {"text": text, "ids": ids, "ids_with_special": with_special} | decodings(ids)

    texts = [s.format(**names) for s in SPECIAL_STRINGS]
    special = [case(text) for text in texts]
    tokenizer.encode_special_tokens = True
    for item, text in zip(special, texts):
        item["ids_as_plain_text"] = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    return {
        "tokenizers": tokenizers.__version__,
        "about": "ids: specials inside the text are recognized, none is added; ids_with_special: as a model is "
        "prompted; "
        "ids_as_plain_text: specials inside the text are ordinary text; decoded*: of `ids`",
        "cases": [case(text) for text in STRINGS],
        "special_cases": special,
        "decode_cases": [{"ids": ids} | decodings(ids) for ids in extra_decodes],
    }


def chat(tokenizer):
    """Conversations rendered by transformers, with every template."""
    out = []
    for name, source in {"bitnet": BITNET_TEMPLATE, **OTHER_TEMPLATES}.items():
        for index, conversation in enumerate(CONVERSATIONS):
            for prompt in (False, True):
                case = {"template": name, "conversation": index, "add_generation_prompt": prompt}
                try:
                    case["text"] = tokenizer.apply_chat_template(
                        conversation, chat_template=source, tokenize=False, add_generation_prompt=prompt
                    )
                    if name == "bitnet":
                        # As the model card does: the tokenizer adds the first token to the rendered text.
                        case["ids"] = tokenizer(case["text"])["input_ids"]
                except Exception as error:
                    case["error"] = str(error)
                out.append(case)
    return {
        "transformers": transformers.__version__,
        "bos_token": BOS,
        "eos_token": EOS,
        "templates": {"bitnet": BITNET_TEMPLATE, **OTHER_TEMPLATES},
        "conversations": [{"messages": c} for c in CONVERSATIONS],
        "cases": out,
    }


def gguf_metadata(folder, model, pre, tokens, types, scores=None):
    """The keys that llama.cpp's convert_hf_to_gguf.py writes for a tokenizer; gguf-py reads the folder."""
    special = gguf.SpecialVocab(folder, load_merges=model == "gpt2", n_vocab=len(tokens))
    keys = {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens}
    if scores is not None:
        keys["tokenizer.ggml.scores"] = scores
    keys["tokenizer.ggml.token_type"] = types
    if special.merges:
        keys["tokenizer.ggml.merges"] = special.merges
    for name, id in special.special_token_ids.items():
        keys[{"unk": "tokenizer.ggml.unknown_token_id"}.get(name, f"tokenizer.ggml.{name}_token_id")] = id
    for name, value in special.add_special_token.items():
        keys[f"tokenizer.ggml.add_{name}_token"] = value
    if special.chat_template:
        keys["tokenizer.chat_template"] = special.chat_template
    return keys


def byte_level_bpe(folder):
    split = pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES - len(UNMERGED) - 4,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train([str(CORPUS)], trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab, merges = learned["vocab"], [" ".join(m) for m in learned["merges"]]
    for word in UNMERGED:
        assert len(learner.encode(word).ids) > 1, word
        ((piece, _),) = byte_level.pre_tokenize_str(word)
        vocab[piece] = len(vocab)
    names = [NOTE, BOS, EOS, EOT]
    first = len(vocab)
    specials = [added(first + i, name, name != NOTE) for i, name in enumerate(names)]
    assert first + len(names) == ENTRIES
    bos, eos, eot = first + 1, first + 2, first + 3
    dump(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": specials,
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": LLAMA3_REGEX},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": False,
                    },
                ],
            },
            "post_processor": {
                "type": "Sequence",
                "processors": [
                    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
                    template(BOS, bos),
                ],
            },
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": vocab,
                "merges": merges,
            },
        },
    )
    config = {
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in specials},
        "bos_token": BOS,
        "chat_template": BITNET_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    dump(folder / "tokenizer_config.json", config)
    dump(
        folder / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": bos, "eos_token_id": [eos, eot]},
    )

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == ENTRIES
    names = {"bos": BOS, "eos": EOS, "eot": EOT, "eot_broken": EOT[:-1]}
    smile = tokenizer.encode("😀", add_special_tokens=False).ids
    decodes = [
        smile[:1],
        smile[:-1],
        smile[1:],
        smile + [eot] + smile[:2],
        [0, bos, 1, first, 2],
        [bos],
        [],
        list(range(256)),
    ]
    result = goldens(tokenizer, names, decodes)
    note = f"a{NOTE}b {NOTE}"
    ids = tokenizer.encode(note, add_special_tokens=False).ids
    result["special_cases"].append(
        {
            "text": note,
            "ids": ids,
            "ids_with_special": tokenizer.encode(note).ids,
            "decoded": tokenizer.decode(ids, skip_special_tokens=False),
            "decoded_without_special": tokenizer.decode(ids),
            "ids_as_plain_text": ids,
        }
    )
    dump_lines(folder / "goldens.json", result)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    dump_lines(folder / "chat.json", chat(fast))

    tokens = [t for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    types = [4 if t == NOTE else 3 if t in (BOS, EOS, EOT) else 1 for t in tokens]
    dump_lines(folder / "gguf.json", gguf_metadata(folder, "gpt2", "llama-bpe", tokens, types))
    return result


def sentencepiece_bpe(folder):
    with tempfile.TemporaryDirectory() as scratch:
        # Latin and Cyrillic lines only, so that letters leave room for merges; other scripts fall back to bytes.
        lines = CORPUS.read_text(encoding="utf-8").split("\n")
        end = next(i for i, line in enumerate(lines) if line.startswith("Καλημέρα"))
        Path(f"{scratch}/corpus.txt").write_text("\n".join(lines[:end]), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=f"{scratch}/corpus.txt",
            model_prefix=f"{scratch}/spm",
            model_type="bpe",
            vocab_size=ENTRIES,
            byte_fallback=True,
            character_coverage=0.98,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
        oracle = sentencepiece.SentencePieceProcessor(model_file=f"{scratch}/spm.model")
    pieces = [oracle.id_to_piece(i) for i in range(oracle.get_piece_size())]
    scores = [oracle.get_score(i) for i in range(len(pieces))]
    assert len(pieces) == ENTRIES and pieces[:3] == ["<unk>", "<s>", "</s>"] and pieces[3] == "<0x00>"
    types = [2, 3, 3] + [6] * 256 + [1] * (ENTRIES - 259)
    assert all(re.fullmatch("<0x[0-9A-F]{2}>", p) for p in pieces[3:259])

    # A merge for each way to cut a piece into two others; what was learned earlier is merged earlier.
    ids = {piece: id for id, piece in enumerate(pieces)}
    merges = []
    for piece, id in ids.items():
        if types[id] == 1:
            cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            cuts = [(a, b) for a, b in cuts if types[ids.get(a, 0)] == 1 and types[ids.get(b, 0)] == 1]
            merges += [(-scores[id], ids[a], ids[b], a, b) for a, b in cuts]
    dump(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [added(i, name) for i, name in enumerate(pieces[:3])],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": template("<s>", 1),
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": ids,
                "merges": [[a, b] for *_, a, b in sorted(merges)],
            },
        },
    )
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): {k: v for k, v in added(i, name).items() if k != "id"}
            for i, name in enumerate(pieces[:3])
        },
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    dump(folder / "tokenizer_config.json", config)

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == ENTRIES
    names = {"bos": "<s>", "eos": "</s>", "eot": "</s>", "eot_broken": "</s"}
    smile = oracle.encode("😀")
    decodes = [
        smile,
        smile[1:],
        smile[1:3],
        smile[:-1],
        smile[2:],
        [1] + smile,
        [2],
        [],
        [0, 300, 0],
        list(range(3, 259)),
    ]
    result = goldens(tokenizer, names, decodes)
    differing = [c["text"] for c in result["cases"] if oracle.encode(c["text"]) != c["ids"]]
    assert not differing, f"sentencepiece itself encodes these otherwise: {differing}"
    dump_lines(folder / "goldens.json", result)
    dump_lines(folder / "gguf.json", gguf_metadata(folder, "llama", "default", pieces, types, scores))
    return result


for name, make in (("bpe", byte_level_bpe), ("spm", sentencepiece_bpe)):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    result = make(folder)
    print(name, *(f"{key} {len(value)}" for key, value in result.items() if key.endswith("cases")))
    for case in result["cases"]:
        if case["decoded"] != case["text"]:
            print("  does not come back:", ascii(case["text"])[:90], ascii(case["decoded"])[:90])
