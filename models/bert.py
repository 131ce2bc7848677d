"""BERT with the layer norm inside the residual, as Megatron-LM rearranges it (Shoeybi et al., arXiv 1909.08053, §4.3).

Two heads: masked language model, its decoder tied to the word embedding, and sentence pair. Parameter names are those
of Hugging Face's MegatronBert, shortened.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, hidden // heads, dropout
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # x [b, s, hidden], mask [b, 1, 1, s]
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)  # [b, heads, s, d]
            for projection in (self.query, self.key, self.value)
        )
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.dense(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads, dropout)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.intermediate = nn.Linear(hidden, intermediate)
        self.output = nn.Linear(intermediate, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        return x + self.dropout(self.output(F.gelu(self.intermediate(self.mlp_norm(x)))))


class Embeddings(nn.Module):
    def __init__(self, vocab: int, positions: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, hidden)
        self.position_embeddings = nn.Embedding(positions, hidden)
        self.token_type_embeddings = nn.Embedding(2, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.dropout(x + self.token_type_embeddings(token_type_ids))


class MaskedLMHead(nn.Module):
    def __init__(self, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        vocab, hidden = word_embeddings.weight.shape
        self.dense = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.decoder = nn.Linear(hidden, vocab)
        self.decoder.weight = word_embeddings.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class SentencePairHead(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.pooler = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class Bert(nn.Module):
    """A masked language model that also classifies sentence pairs.

    Gives both heads' logits, or the sum of both mean losses when `labels` and `pair_labels` are given.
    `hidden` must be a multiple of `heads`; sequences are at most `positions` long.
    """

    def __init__(
        self,
        vocab: int = 30592,
        positions: int = 512,
        hidden: int = 128,
        heads: int = 8,
        layers: int = 4,
        intermediate: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden {hidden} is not a multiple of heads {heads}")
        self.embeddings = Embeddings(vocab, positions, hidden, dropout)
        self.layers = nn.ModuleList(Layer(hidden, heads, intermediate, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.masked_lm = MaskedLMHead(self.embeddings.word_embeddings)
        self.sentence_pair = SentencePairHead(hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02) weights, the ones before a residual sum divided by √(2·layers); biases are 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("attention.dense.weight", "output.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.layers)))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pair_labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """All [b, s] but `pair_labels` [b]. `attention_mask` is 0 on padding, `labels` -100 where none counts."""
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        words, pairs = self.masked_lm(x), self.sentence_pair(x)  # [b, s, vocab], [b, 2]
        if labels is None or pair_labels is None:
            return words, pairs
        return F.cross_entropy(words.flatten(0, 1), labels.flatten()) + F.cross_entropy(pairs, pair_labels)


Model = Bert


def example_inputs(batch: int = 2, sequence: int = 16, vocab: int = 30592) -> dict[str, Tensor]:
    """Random sentence pairs, padded to one length; every fifth token is to be guessed."""
    position = torch.arange(sequence)
    lengths = torch.randint(sequence // 2 + 1, sequence + 1, (batch, 1))
    labels = torch.randint(vocab, (batch, sequence))
    return {
        "input_ids": torch.randint(vocab, (batch, sequence)),
        "attention_mask": (position < lengths).long(),
        "token_type_ids": (position >= lengths // 2).long(),
        "labels": labels.masked_fill((position % 5 != 2) | (position >= lengths), -100),
        "pair_labels": torch.randint(2, (batch,)),
    }
