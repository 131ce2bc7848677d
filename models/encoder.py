"""A sequence classifier out of torch's own parts: `nn.TransformerEncoder`, and so `nn.MultiheadAttention`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """Classifies token sequences: the logits, or the mean loss when `labels` are given.

    `hidden` must be a multiple of `heads`; sequences are at most `positions` long.
    """

    def __init__(
        self,
        vocab: int = 8192,
        positions: int = 512,
        hidden: int = 128,
        heads: int = 8,
        layers: int = 4,
        intermediate: int = 512,
        classes: int = 5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(positions, hidden)
        layer = nn.TransformerEncoderLayer(
            hidden, heads, intermediate, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(hidden), enable_nested_tensor=False)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, padding: Tensor, labels: Tensor | None = None) -> Tensor:
        """`input_ids` [b, s]; `padding` [b, s] is true where there is no token; `labels` [b]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(positions)
        x = self.encoder(x, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(x.dtype)  # [b, s, 1]
        logits = self.classifier((x * kept).sum(dim=1) / kept.sum(dim=1))
        return logits if labels is None else F.cross_entropy(logits, labels)


Model = Encoder


def example_inputs(batch: int = 2, sequence: int = 16, vocab: int = 8192, classes: int = 5) -> dict[str, Tensor]:
    """Random sentences of different lengths, padded to `sequence`."""
    lengths = torch.randint(sequence // 2 + 1, sequence + 1, (batch, 1))
    return {
        "input_ids": torch.randint(vocab, (batch, sequence)),
        "padding": torch.arange(sequence) >= lengths,
        "labels": torch.randint(classes, (batch,)),
    }
