"""A tiny random model of every causal family that transformers ships. `python -m tests.families` runs the stage `cache`
on each and writes docs/MODELS.md.

One rule serves nearly all. A configuration's field gets the small value that SIZES has for its name, in nested
configurations too, and one layer of each kind is kept. EXCEPTIONS holds what a family needs beyond that.
"""

import argparse
import contextlib
import dataclasses
import io
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from ruamel.yaml import YAML
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from pipeline import file_io
from pipeline.errors import UserError
from pipeline.stages import cache
from tests import repositories

TABLE = Path(__file__).resolve().parents[1] / "docs/MODELS.md"
MARK = "<!-- made by `python -m tests.families` -->"
TOKENIZER = Path(__file__).resolve().parents[1] / "data/pocket/checkpoint"
VOCABULARY = 4096  # of that tokenizer; its end of text is 0
NOISE = 0.2  # added to every weight: some families start at zeros, where nothing could go wrong
LENGTH = 40  # tokens of the sequence that `raise_if_degenerate` feeds: longer than each window and chunk
SECONDS = 120  # that `main` gives to a family, so that none hangs

SIZES: dict[str, Any] = {
    name: value
    for value, names in (
        (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
        (0, "eos_token_id"),
        (1, "pad_token_id"),
        (2, "bos_token_id decoder_start_token_id"),
        (3, "sep_token_id"),
        (4, "cls_token_id"),
        (None, "forced_eos_token_id begin_suppress_tokens"),
        (256, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
        # width
        (32, "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embed_dim lru_width"),
        (32, "hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size"),
        (64, "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner"),
        (64, "d_ff dim_ff ffn_hidden_size expert_ffn_hidden_size feed_forward_size mlp_dim intermediate_size_mlp"),
        (64, "shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size mamba_d_ssm"),
        (64, "dense_intermediate_size prefix_dense_intermediate_size moe_shared_expert_intermediate_size"),
        (16, "kv_lora_rank q_lora_rank o_lora_rank"),
        (16, "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim"),
        (8, "hidden_size_per_layer_input laurel_rank hc_lowrank"),
        # depth: `_one_layer_of_each_kind` adds to it
        (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_blocks"),
        (2, "num_decoder_layers num_encoder_layers"),
        # heads
        (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
        (4, "num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads"),
        (4, "linear_num_heads linear_num_value_heads index_n_heads indexer_n_heads mamba_n_heads mamba_num_heads"),
        (4, "n_mamba_heads"),
        (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads n_groups"),
        (1, "indexer_kv_heads"),
        (8, "head_dim swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim"),
        (8, "indexer_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim kv_channels dim_head d_head"),
        (8, "d_kv attention_head_size"),
        (4, "rotary_dim"),
        # windows and chunks
        (16, "sliding_window sliding_window_size attention_window_size window_size keep_window_size local_attention"),
        (16, "attention_chunk_size mamba_chunk_size chunk_size block_size local_attention_window_len index_topk"),
        (16, "lsh_attn_chunk_length local_attn_chunk_length indexer_budget"),
        (4, "index_block_size indexer_compress_ratio"),
        (2, "index_topk_blocks"),
        (True, "use_sliding_window"),
        # experts: the first layer is dense where a family can have such
        (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
        (2, "num_experts_per_tok moe_topk moe_k top_k_experts"),
        (1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace"),
        (1, "num_dense_layers max_window_layers"),
        (True, "is_decoder"),  # BERT and its kin see later tokens otherwise
    )
    for name in names.split()
}

SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # all kinds of layers: the default has one only, or does not list them layer by layer
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": SLIDING_AND_FULL
    | {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None}},
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "index_topk": 4,  # of ten compressed positions
    },
    "flint": {"mlp_only_layers": [0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": SLIDING_AND_FULL,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention"] * 3 + ["full_attention"], "moe_layers": [1, 3]},
    "mellum": SLIDING_AND_FULL,
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "ministral": SLIDING_AND_FULL,
    "mllama_text_model": {"cross_attention_layers": [1]},
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"], "num_experts_per_tok": 1},
    "qwen4_exp_text": {"ple_layer_ids": [1], "ngram_vocab_size_base": 64},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],  # their product is the number of positions, the widths add up to the hidden size
        "axial_pos_embds_dim": [16, 16],
        "hash_seed": 0,  # without it each pass draws other hashes
    },
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},  # hybrid layers share their attention
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    # layers that share keys and values need one of their kind before them
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    # sizes that must fit each other, or whose names mean something else in other families
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16,
    },
    "big_bird": {"block_size": 4, "num_random_blocks": 1},  # full attention up to (5 + 2 * 1) * 4 = 28 tokens
    "doge": {"keep_window_size": 8},  # has an effect only below the sliding window
    "mamba2": {"head_dim": 16},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "use_cache": False,  # the cache asks for `num_hidden_layers`, which the configuration lacks
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "xlstm": {"hidden_size": 128},  # its heads are multiples of 64 in one place and not in another
    # the default makes logits that hardly differ from each other
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    # switches
    "phi4_multimodal": {"eos_token_id": [0]},  # a plain 0 becomes the ids of its own vocabulary
    "xlm": {"causal": True},  # it sees later tokens otherwise
    "xmod": {"default_language": "en_XX"},  # it does not run without
    "youtu": {"pad_token_id": None},  # from_pretrained zeroes the embedding of that token
}  # fmt: skip

NOT_BUILT = {
    "gemma3n": "its image encoder needs timm; gemma3n_text is its language model",
    "gemma4_assistant": "drafts tokens from the hidden states of a gemma4: it runs on no tokens alone",
    "gemma4_unified_assistant": "drafts tokens from the hidden states of a gemma4_unified: it runs on no tokens alone",
    "musicgen": "transformers' MusicgenForCausalLM takes the nested decoder's configuration only, not this one",
    "musicgen_melody": "transformers' MusicgenMelodyForCausalLM takes the nested decoder's configuration only",
}


def families() -> list[str]:
    """Model types of all causal language models that transformers names, those in NOT_BUILT too."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(cls: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A small configuration; `changes` are its fields, and a nested configuration's as a dict under its name."""
    fields = {field.name for field in dataclasses.fields(cls)}
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # multi-head latent attention has no groups
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name, spec in (cls.sub_configs_defaults or {}).items():
        if not spec.optional:
            nested = CONFIG_MAPPING[spec.model_type] if spec.model_type else spec.config_class
            sizes[name] = small_config(nested, **changes.pop(name, {}))
    sizes |= EXCEPTIONS.get(cls.model_type, {}) | changes
    if "num_hidden_layers" in fields and "num_hidden_layers" not in changes:
        sizes |= _one_layer_of_each_kind(cls, sizes)
    return cls(**sizes)


def _one_layer_of_each_kind(cls: type[PreTrainedConfig], sizes: dict[str, Any]) -> dict[str, Any]:
    """The number of layers and the lists with an entry for each, cut to the first layer of each kind, two at least."""
    for name in ("layer_types", "layers_block_type"):
        if name in sizes:
            return {"num_hidden_layers": len(sizes[name])}
    depth = cls.default_config_fields()["num_hidden_layers"]
    deep = vars(cls(**sizes | {"num_hidden_layers": depth}))
    lists = {name: value for name, value in deep.items() if isinstance(value, list) and len(value) == depth}
    kinds = list(zip(*lists.values(), strict=True))
    layers = sorted({kind: kinds.index(kind) for kind in kinds}.values())
    layers = layers if len(layers) > 1 else [0, 1]
    return {"num_hidden_layers": len(layers)} | {name: [value[i] for i in layers] for name, value in lists.items()}


def tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random model of this family, the same at each call: float32, on the CPU, in eval mode."""
    if model_type in NOT_BUILT:
        raise NotImplementedError(f"{model_type}: {NOT_BUILT[model_type]}")
    config = small_config(CONFIG_MAPPING[model_type], **changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter += NOISE * torch.randn_like(parameter)
    return model


def save(model_type: str, folder: Path, **changes: Any) -> None:
    """Write `tiny` as a checkpoint, with the tokenizer of the pocket model."""
    model = tiny(model_type, **changes)
    raise_if_degenerate(model)
    model.save_pretrained(folder)
    # a text model keeps its part of a nested configuration; published checkpoints hold the whole
    small_config(CONFIG_MAPPING[model_type], **changes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


def raise_if_degenerate(model: PreTrainedModel) -> None:
    """AssertionError for a model that could hide a fault: whose logits hardly depend on what it reads."""
    ids = torch.randint(1, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -10] = ids[0, -10] % (VOCABULARY - 1) + 1
    with torch.no_grad():
        logits, changed = (model(input_ids=tokens).logits for tokens in (ids, other))
    assert logits.isfinite().all(), "logits are not finite"
    assert logits.std() > 0.1, f"logits hardly differ from each other: {logits.std():.3f}"
    change = (changed - logits)[0, -1].abs().max()
    assert change > 0.005, f"the last logits hardly depend on the token ten before: {change:.4f}"


def try_cache(model_type: str, place: Path, encoder: Path, **changes: Any) -> tuple[str, str]:
    """What the stage `cache` says of a family, run in the empty folder `place`: a result of docs/MODELS.md, and why.

    changes: keys of params.yaml, such as train.lora_rank.
    """
    save(model_type, place / "models/local/mine")
    shutil.copytree(encoder, place / "models/local/encoder")
    (place / "data/prompts").mkdir(parents=True)
    for file in ("train", "heldout"):  # of different lengths; with a completion of 20 tokens beyond windows of 16
        prompts = ["Say", "What is a policy?", "Tell me more of it, please", "And who are you, if I may ask that?"]
        file_io.write_jsonl(place / f"data/prompts/{file}.jsonl", [{"prompt": prompt} for prompt in prompts])
    yaml = YAML()
    tree = yaml.load(TOKENIZER.parents[2] / "params.yaml")
    tree["models"]["mine"] = {"source": "models/local/mine"}
    tree["encoders"]["mine"] = {"source": "models/local/encoder"}
    tree["model"] = tree["encoder"] = "mine"
    tree["train"]["threads"] = 1
    for key, value in changes.items():
        table, _, name = key.partition(".")
        tree[table][name] = value
    yaml.dump(tree, place / "params.yaml")
    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            cache.main()
        except UserError as error:
            text = str(error).partition(" cannot be ")[2] or str(error)
            return "refused", text.replace("|", "\\|")
    how = said.getvalue().partition("models.mine: ")[2]
    result = "much slower" if "much slower" in how else "slower" if "slower" in how else ""
    return ", ".join(["exact", *([result] if result else [])]), how.rpartition("; ")[0]


def write_table(results: dict[str, tuple[str, str]]) -> None:
    """docs/MODELS.md between its marks."""
    counts = Counter(result for result, _ in results.values())
    lines = [
        f"transformers {transformers.__version__}: " + "; ".join(f"{n} {name}" for name, n in counts.most_common()), "",
        "| family | result | how, or why not |", "|---|---|---|",
        *(f"| `{family}` | {result} | {why} |" for family, (result, why) in sorted(results.items())),
    ]  # fmt: skip
    head, mark, _ = TABLE.read_text(encoding="utf-8").partition(MARK)
    TABLE.write_text(f"{head}{mark}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """One line a family; exits with 1 if one that should be built is not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("families", nargs="*", help="model types (all, which writes docs/MODELS.md)")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def interrupt(*_: Any) -> None:
        raise TimeoutError(f"takes more than {SECONDS} s")

    signal.signal(signal.SIGALRM, interrupt)
    failed, options, results = False, parser.parse_args(), {}
    encoder = repositories.write_bert(Path(tempfile.mkdtemp()) / "bert")
    for model_type in options.families or families():
        signal.alarm(SECONDS)
        try:
            if model_type in NOT_BUILT:
                results[model_type] = "not tried", NOT_BUILT[model_type]
            else:
                with tempfile.TemporaryDirectory() as folder:
                    results[model_type] = try_cache(model_type, Path(folder), encoder)
            line = ": ".join(results[model_type])
        except Exception as error:  # the next family is tried all the same
            line, failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", True
        finally:
            signal.alarm(0)
        print(f"{model_type:25} {line}", flush=True)
    if not options.families and not failed:
        write_table(results)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
