"""The embedding reward: minus the L2 distance between the sentence embeddings of a completion and a target."""

from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.models.tokenization import end_dropout
from pipeline.rewards.batch import RewardBatch, TermReward
from pipeline.rewards.text_models import loading_options, texts_at_once


def embedding_reward(
    target: str, encoder: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> TermReward:
    """R(y) = -||e(y) - e(target)||_2, with e(y) the encoder's last hidden state, averaged over tokens, not normalised.

    The notebook's reward. An empty completion is embedded like any text, by its special tokens.
    encoder: folder of a BERT-like model and its tokenizer. dtype: of its weights and activations; bfloat16 takes half
    the time and changes rewards by about a hundredth of their spread. Raises UserError without sentence-transformers >=
    5.
    """
    try:  # a slow import
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError as error:
        raise UserError(f"the embedding reward needs sentence-transformers >= 5: {error}") from None
    from transformers.utils import logging

    logging.disable_progress_bar()
    states = Transformer(str(encoder), model_kwargs=loading_options(device, dtype))
    end_dropout(states.tokenizer)
    pooling = Pooling(states.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[states, pooling], device=str(device))

    def embed(texts: list[str]) -> torch.Tensor:
        embedded = model.encode(
            texts, batch_size=texts_at_once(device), convert_to_tensor=True, show_progress_bar=False
        )
        return embedded.float()

    goal = embed([target])

    def reward(batch: RewardBatch) -> list[float]:
        distinct = list(dict.fromkeys(batch.completions))
        distances = torch.linalg.vector_norm(embed(distinct) - goal, dim=1)
        scores = dict(zip(distinct, (-distances).tolist(), strict=True))
        return [scores[completion] for completion in batch.completions]

    return reward
