"""A word or character language model on `torch.nn.LSTM`."""

from jaxtyping import Float, Int64
from torch import Tensor, nn

from spectrim.errors import SettingError

__all__ = ["LSTMLanguageModel"]


class LSTMLanguageModel(nn.Module):
    """Embedding, stacked LSTM, linear decoder; dropout before, between and after the recurrent layers.

    Every window starts from the zero state. Source: Zaremba et al., "Recurrent neural network regularization", arXiv 1409.2329.
    Deviation: the state is not carried between windows, so perplexities are somewhat higher than with carried state.

    Args:
        vocab: number of token ids, >= 1.
        embedding: width of the embedding, >= 1.
        hidden: width of the recurrent state, >= 1.
        layers: number of recurrent layers, >= 1.
        dropout: probability in [0, 1).
        tied: the decoder shares the embedding's weight; needs ``embedding == hidden``.

    Raises:
        SettingError: an argument outside these ranges.
    """

    def __init__(
        self, vocab: int, embedding: int = 200, hidden: int = 200, layers: int = 2, dropout: float = 0.2, tied: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("vocab", vocab), ("embedding", embedding), ("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise SettingError("LSTMLanguageModel", name, got=value, rule="an integer >= 1")
        if not 0 <= dropout < 1:
            raise SettingError("LSTMLanguageModel", "dropout", got=dropout, rule="a probability in [0, 1)")
        if tied and embedding != hidden:
            raise SettingError("LSTMLanguageModel", "embedding", got=embedding, rule=f"hidden ({hidden}) when tied=True")
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocab, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, dropout=dropout if layers > 1 else 0.0, batch_first=True)
        self.decoder = nn.Linear(hidden, vocab)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Return the logits of the next token at each position, from ids in ``[0, vocab)``."""
        states, _ = self.lstm(self.dropout(self.embedding(tokens)))
        logits: Tensor = self.decoder(self.dropout(states))
        return logits
