"""One linear head per game, evaluated only for each sample's own game.

Legend: B batch, G games, D features, O outputs of a head, T tiles of R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TILE_ROWS = 32


class PerGameLinear(nn.Module):
    """``weight[game] @ features + bias[game]`` for a batch in which every sample names its game.

    Two ways to compute it, chosen from the shapes alone, so that nothing is read back from the device and both compile
    with ``fullgraph=True``:

    - *all heads*: one matrix product with every head, then pick the rows of each sample's game: ``B * G`` rows of work.
    - *tiles*: put each game's samples into tiles of 32 rows, then one batched product of tiles with their game's head:
      at most ``B + 31 * G`` rows of work, and no ``[B, G, O]`` output.

    ``benchmarks/results/per_game_heads.md`` has the times of both, and what else was tried.

    Args:
        num_games (int): ``G``.
        in_features (int): ``D``.
        out_features (int): ``O``.
        weight_std (float or None): standard deviation of the initial weights' normal distribution; ``None`` takes that
            of ``nn.Linear``, uniform in ``+-1 / sqrt(D)``.

    Shape:
        - features: ``[B, D]`` float
        - game_id: ``[B]`` int64 in ``[0, G)``; others raise, or give something of the same sample
        - output: ``[B, O]`` in the parameters' dtype (under autocast only the product is of lower precision)
    """

    def __init__(self, num_games: int, in_features: int, out_features: int, weight_std: float | None = None) -> None:
        super().__init__()
        self.weight_std = weight_std
        self.weight = nn.Parameter(torch.empty(num_games, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_games, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights and biases of 0."""
        if self.weight_std is not None:
            nn.init.normal_(self.weight, std=self.weight_std)
        else:
            bound = self.weight.shape[-1] ** -0.5
            nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor, game_id: Tensor) -> Tensor:
        num_games, batch_size = self.weight.shape[0], features.shape[0]
        many_games = num_games >= 8 and batch_size >= 10 * num_games
        product = self._tiles(features, game_id) if many_games else self._all_heads(features, game_id)
        return product.to(self.bias.dtype) + self.bias[game_id]

    def _all_heads(self, features_BD: Tensor, game_id_B: Tensor) -> Tensor:
        num_games, num_outputs, _ = self.weight.shape
        product = F.linear(features_BD, self.weight.flatten(0, 1)).view(-1, num_games, num_outputs)
        # Within each sample's own row, so that no game_id can reach another sample.
        return product[torch.arange(features_BD.shape[0], device=game_id_B.device), game_id_B]

    def _tiles(self, features_BD: Tensor, game_id_B: Tensor) -> Tensor:
        num_games = self.weight.shape[0]
        batch_size, num_features = features_BD.shape
        # The most tiles that any split of the batch over the games can need, known without reading game_id.
        num_tiles = (batch_size + num_games * (_TILE_ROWS - 1)) // _TILE_ROWS
        seen_BG = F.one_hot(game_id_B, num_games).cumsum(0)
        rank_B = seen_BG.gather(1, game_id_B.unsqueeze(1)).squeeze(1) - 1  # position among its game's samples
        tiles_G = (seen_BG[-1] + _TILE_ROWS - 1) // _TILE_ROWS
        end_tile_G = tiles_G.cumsum(0)
        slot_B = (end_tile_G - tiles_G)[game_id_B] * _TILE_ROWS + rank_B
        tile = torch.arange(num_tiles, device=game_id_B.device)
        # Unused tiles at the end hold zeros; any game will do for them.
        game_T = torch.searchsorted(end_tile_G, tile, right=True).clamp_max(num_games - 1)
        tiles_TRD = features_BD.new_zeros(num_tiles * _TILE_ROWS, num_features).index_copy(0, slot_B, features_BD)
        # `weight[game_T]`, not index_select: its backward is deterministic on CUDA, and faster on CPU.
        product_TRO = torch.bmm(tiles_TRD.view(num_tiles, _TILE_ROWS, -1), self.weight[game_T].transpose(1, 2))
        return product_TRO.flatten(0, 1)[slot_B]
