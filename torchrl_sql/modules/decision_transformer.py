"""The Multi-Game Decision Transformer: a return-conditioned model of windows of play (MGDT, arXiv:2205.15241).

Written after the paper's main text and its authors' public notebook (google-research/multi_game_dt). What neither says
is marked [ours].

Legend: B batch, K steps of a window, P patches of a frame, T tokens of a step, L = K * T, D width, A actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_sql.arguments import check_number
from torchrl_sql.games import FRAME_SHAPE, NUM_ACTIONS, legal_action_mask, resolve_games
from torchrl_sql.modules.policy import check_outputs, sample_index
from torchrl_sql.modules.q_network import unit_frames

LOWEST_RETURN, HIGHEST_RETURN = -20, 100
NUM_RETURNS = HIGHEST_RETURN - LOWEST_RETURN + 1
"""121 return tokens, one a unit. The notebook has 120, so that +100 has no token of its own."""
NUM_REWARDS = 4
"""Reward tokens: 0 for no reward, 1 for a positive one, 2 for the end of the game, 3 for a negative one."""

_HEAD_WIDTH = 64


def encode_return(return_to_go: Tensor) -> Tensor:
    """Return tokens int64 in 0..120: whole units (towards zero), clipped to -20..100."""
    return return_to_go.clamp(LOWEST_RETURN, HIGHEST_RETURN).long() - LOWEST_RETURN


def encode_reward(reward: Tensor, terminated: Tensor) -> Tensor:
    """Reward tokens int64 in 0..3, by the reward's sign or, where true, by ``terminated``.

    The notebook names the token for the end of the game and does not make it; that it takes the place of the last
    reward is [ours].
    """
    return torch.where(terminated, 2, (reward > 0).long() + 3 * (reward < 0).long())


class DecisionTransformer(nn.Module):
    """A transformer over the tokens of ``K`` steps: patches of the frame, return-to-go, action, reward.

    It predicts the return from the first frame's last patch, each action from the return token before it (or, without
    return tokens, from the last patch) and each reward from the action before it. A token sees all earlier ones and all
    patches of its own frame. Of the return tokens only the first step's is ever seen; the others are zeros whose
    outputs predict the action. The game is not told: it is to be recognised.

    Pre-norm blocks with heads of 64, feed-forward layers of ``4 D`` with tanh-GELU, dropout on both branches; initial
    weights as in the notebook (Haiku's: normals cut at two standard deviations).

    Keyword Args:
        width (int): ``D``, a multiple of 64.
        num_layers (int): blocks.
        num_steps (int): ``K``.
        patch_size (int): pixels of a patch's side, a divisor of 84.
        dropout (float): in [0, 1).
        return_token (bool): False leaves the return tokens out: behavioural cloning with the same network.

    Shape:
        - observation: ``[*B, K, 84, 84]`` uint8, one frame a step
        - action: ``[*B, K]`` int64
        - reward: ``[*B, K, 1]`` float; terminated: ``[*B, K, 1]`` bool
        - return_to_go: ``[*B, K]`` float; not an argument without return tokens
        - output: ``action_logits`` ``[*B, K, A]``, ``reward_logits`` ``[*B, K, 4]``, ``reward_token`` ``[*B, K]`` and,
          with return tokens, ``return_logits`` ``[*B, 121]`` and ``return_token`` ``[*B]`` of the first step. Logits
          are in the parameters' precision, also under autocast.

    Raises:
        ValueError: for sizes out of range or shapes other than the above.
    """

    visible: Tensor
    attended: Tensor

    def __init__(
        self,
        *,
        width: int,
        num_layers: int,
        num_steps: int = 4,
        patch_size: int = 14,
        dropout: float = 0.1,
        return_token: bool = True,
    ) -> None:
        super().__init__()
        check_width(width)
        if num_layers < 1 or num_steps < 1:
            raise ValueError(f"num_layers and num_steps must be at least 1, got {num_layers} and {num_steps}")
        if patch_size < 1 or any(side % patch_size for side in FRAME_SHAPE):
            raise ValueError(f"patch_size must divide the frame's {FRAME_SHAPE}, got {patch_size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.num_steps = num_steps
        self.return_token = return_token
        self.num_patches = math.prod(side // patch_size for side in FRAME_SHAPE)
        self.patches = nn.Conv2d(1, width, patch_size, patch_size)
        self.patch_position = nn.Parameter(torch.empty(self.num_patches, width))
        self.returns = nn.Embedding(NUM_RETURNS, width) if return_token else None
        self.actions = nn.Embedding(NUM_ACTIONS, width)
        self.rewards = nn.Embedding(NUM_REWARDS, width)
        self.tokens_per_step = self.num_patches + 2 + return_token
        self.position = nn.Parameter(torch.empty(num_steps * self.tokens_per_step, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.return_head = nn.Linear(width, NUM_RETURNS) if return_token else None
        self.action_head = nn.Linear(width, NUM_ACTIONS)
        self.reward_head = nn.Linear(width, NUM_REWARDS)
        visible_L = torch.ones(num_steps, self.tokens_per_step, dtype=torch.bool)
        if return_token:
            visible_L[1:, self.num_patches] = False
        self.register_buffer("visible", visible_L.flatten(), persistent=False)
        self.register_buffer("attended", self._attention_mask() & self.visible, persistent=False)
        self.reset_parameters()

    def _attention_mask(self) -> Tensor:
        """Bool ``[L, L]``: row ``i`` may see column ``j``, the visibility of return tokens aside."""
        token = torch.arange(len(self.position))
        step = token // self.tokens_per_step
        is_patch = token % self.tokens_per_step < self.num_patches
        causal = token.unsqueeze(-1) >= token
        return causal | (step.unsqueeze(-1) == step) & is_patch.unsqueeze(-1) & is_patch

    def reset_parameters(self) -> None:
        """Starts again from random weights."""
        in_blocks = set(self.blocks.modules())
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                _truncated_normal(module.weight, 0.02)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                variance = 1 / module.weight[0].numel()
                if module in in_blocks:  # Haiku's variance scaling makes up for the cut, its default does not
                    variance *= 2 / len(self.blocks) / 0.87962566**2
                _truncated_normal(module.weight, math.sqrt(variance))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        _truncated_normal(self.position, 0.02)
        nn.init.normal_(self.patch_position, std=0.02)

    def forward(
        self,
        observation: Tensor,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        return_to_go: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        x_BKTD = self._outputs(observation, action, reward, terminated, return_to_go)
        action_logits = self.action_head(x_BKTD[..., self._before_action, :]).to(self.position.dtype)
        reward_logits = self.reward_head(x_BKTD[..., self._before_action + 1, :]).to(self.position.dtype)
        out = (action_logits, reward_logits, encode_reward(reward, terminated).squeeze(-1))
        if self.return_head is None or return_to_go is None:
            return out
        return_logits = self.return_head(x_BKTD[..., 0, self.num_patches - 1, :]).to(self.position.dtype)
        return (*out, return_logits, encode_return(return_to_go[..., 0]))

    def features(self, *inputs: Tensor, mask: Tensor) -> Tensor:
        """What the action of a window's last step is predicted from, ``[*B, D]``.

        Arguments as of the network; of the steps, those count that ``mask`` ``[*B, K]`` marks, the first ones.
        """
        x_BKD = self._outputs(*inputs)[..., self._before_action, :]
        last = (mask.sum(-1) - 1).clamp_min(0)[..., None, None].expand(*mask.shape[:-1], 1, x_BKD.shape[-1])
        return x_BKD.gather(-2, last).squeeze(-2)

    @property
    def _before_action(self) -> int:
        """The token of a step that predicts its action."""
        return self.num_patches - 1 + self.return_token

    def _outputs(
        self,
        observation: Tensor,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        return_to_go: Tensor | None = None,
    ) -> Tensor:
        """Of all tokens, ``[*B, K, T, D]``."""
        batch_shape = self._check_shapes(observation, action, reward, terminated, return_to_go)
        num_windows, width = math.prod(batch_shape), self.position.shape[-1]
        tokens = [
            self._embed_frames(observation).reshape(num_windows, self.num_steps, self.num_patches, width),
            self.actions(action).reshape(num_windows, self.num_steps, 1, width),
            self.rewards(encode_reward(reward, terminated)).reshape(num_windows, self.num_steps, 1, width),
        ]
        if self.returns is not None and return_to_go is not None:
            tokens.insert(1, self.returns(encode_return(return_to_go)).reshape(num_windows, self.num_steps, 1, width))
        x_BLD = (torch.cat(tokens, dim=2).flatten(1, 2) + self.position) * self.visible.unsqueeze(-1)
        x_BKTD = self._transform(x_BLD, self.attended).unflatten(1, (self.num_steps, self.tokens_per_step))
        return x_BKTD.reshape(*batch_shape, *x_BKTD.shape[1:])

    def predict_return(self, frame: Tensor) -> Tensor:
        """``return_logits`` ``[B, 121]`` of windows that begin with these frames ``[B, 84, 84]`` uint8.

        The same as :meth:`forward` gives: nothing else is seen by the token that predicts the return.
        """
        if self.return_head is None:
            raise ValueError("a network without return tokens predicts no returns")
        x_BPD = self._embed_frames(frame) + self.position[: self.num_patches]
        return self.return_head(self._transform(x_BPD)[:, -1]).to(self.position.dtype)

    def _embed_frames(self, frames: Tensor) -> Tensor:
        """Patch tokens ``[B, P, D]`` of frames ``[*B, 84, 84]``, flattened."""
        pixels = unit_frames(frames.reshape(-1, 1, *FRAME_SHAPE), self.position.dtype)
        return self.patches(pixels).flatten(2).transpose(1, 2) + self.patch_position

    def _transform(self, x_BLD: Tensor, attended_LL: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x_BLD = block(x_BLD, attended_LL)
        return self.norm(x_BLD)

    def _check_shapes(
        self, observation: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, return_to_go: Tensor | None
    ) -> torch.Size:
        """The batch shape; raises ``ValueError`` for tensors that do not fit together."""
        batch_shape = action.shape[:-1]
        window = (*batch_shape, self.num_steps)
        expected = {
            "observation": (observation, (*window, *FRAME_SHAPE)),
            "action": (action, window),
            "reward": (reward, (*window, 1)),
            "terminated": (terminated, (*window, 1)),
        }
        if return_to_go is not None:
            expected["return_to_go"] = (return_to_go, window)
        for name, (value, shape) in expected.items():
            if value.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")
        if (return_to_go is None) == self.return_token:
            raise ValueError(f"return_to_go must be given if and only if return_token, which is {self.return_token}")
        return batch_shape


def check_width(width: int) -> None:
    """Raises ``ValueError`` for a width that heads of 64 do not divide."""
    if width < _HEAD_WIDTH or width % _HEAD_WIDTH:
        raise ValueError(f"width must be a positive multiple of {_HEAD_WIDTH}, got {width}")


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each normalized before and added to what it read."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = width // _HEAD_WIDTH
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)  # [ours] one, with one trust ratio in LAMB, not three
        self.attention_out = nn.Linear(width, width)
        self.hidden_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.hidden_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, attended_LL: Tensor | None) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x_BLD)).unflatten(-1, (3, self.num_heads, _HEAD_WIDTH))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attended_LL)
        x_BLD = x_BLD + self.dropout(self.attention_out(mixed.transpose(1, 2).flatten(2)))
        hidden = F.gelu(self.hidden(self.hidden_norm(x_BLD)), approximate="tanh")
        return x_BLD + self.dropout(self.hidden_out(hidden))


def _truncated_normal(tensor: Tensor, std: float) -> None:
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def make_decision_transformer(
    *,
    width: int,
    num_layers: int,
    num_steps: int = 4,
    patch_size: int = 14,
    dropout: float = 0.1,
    return_token: bool = True,
) -> TensorDictModule:
    """Makes the network as a TensorDict module for :class:`torchrl_sql.objectives.DecisionTransformerLoss`.

    The published sizes, as (width, layers): (512, 4) is called 10M and has 13.0M parameters, (768, 6) is called 40M and
    has 43.0M, (1280, 10) is called 200M and has 197.6M. For the arguments see :class:`DecisionTransformer`.

    Returns:
        A module that reads the windows of :class:`torchrl_sql.data.AtariSequenceStorage` and writes the network's
        outputs under their names.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> network = make_decision_transformer(width=64, num_layers=1)
        >>> window = TensorDict(
        ...     {
        ...         "observation": torch.zeros(5, 4, 84, 84, dtype=torch.uint8),
        ...         "action": torch.zeros(5, 4, dtype=torch.int64),
        ...         "return_to_go": torch.zeros(5, 4),
        ...         "next": {"reward": torch.zeros(5, 4, 1), "terminated": torch.zeros(5, 4, 1, dtype=torch.bool)},
        ...     },
        ...     batch_size=[5],
        ... )
        >>> network(window)["action_logits"].shape
        torch.Size([5, 4, 18])
    """
    network = DecisionTransformer(
        width=width,
        num_layers=num_layers,
        num_steps=num_steps,
        patch_size=patch_size,
        dropout=dropout,
        return_token=return_token,
    )
    in_keys: list[NestedKey] = ["observation", "action", ("next", "reward"), ("next", "terminated")]
    out_keys: list[NestedKey] = ["action_logits", "reward_logits", "reward_token"]
    if return_token:
        in_keys.append("return_to_go")
        out_keys += ["return_logits", "return_token"]
    return TensorDictModule(network, in_keys=in_keys, out_keys=out_keys)


class DecisionTransformerPolicy(TensorDictModuleBase):
    """Acts with a decision transformer: chooses a return for the window, then an action that goes with it.

    Decodings, the present step being the window's last:

    - ``"expert"``: the return from ``log P(R) + kappa (R - R_low) / (R_high - R_low)``, the action from ``P(a | R)``
      [paper MGDT];
    - ``"expert_128"``: the largest of 128 returns drawn from ``softmax(0.75 log P(R))``, then an action drawn among
      those whose logit lies above the median of all 18 (the notebook's way);
    - ``"sampled"``: both from the model: play like the data's;
    - ``"greedy"``: the likeliest of both.

    Actions that the game does not know are never drawn (the notebook plays them as NOOP; where no known one is left,
    so does this). A network without return tokens only draws an action, ``"sampled"`` or ``"greedy"``.

    Nothing is drawn here: the numbers come with the batch, one for the return and one for the action. The largest of
    128 draws takes one too: its distribution function is the 128th power of a draw's.

    Reads: ``("context", "observation" | "action" | "reward" | "mask")``, the last ``K`` steps, see
    :func:`torchrl_sql.envs.next_context`; ``game_id`` ``[B]`` int64; unless greedy ``uniform`` and, with return tokens,
    ``return_uniform`` ``[B]`` float64 in [0, 1). Any other leading dimensions will do.

    Writes: ``action`` ``[B]`` int64, ``action_value`` ``[B, 18]`` float, the action's logits.

    Args:
        network (TensorDictModule): what :func:`make_decision_transformer` made, in evaluation mode.
        games (sequence of str): its games, in the order of ``game_id``; kept as ``games``.

    Keyword Args:
        decoding (str): see above.
        kappa (float): how strongly ``"expert"`` prefers high returns; at least 0.

    Raises:
        TypeError, ValueError: for an unknown game or decoding, one that needs returns without return tokens, or another
            kappa.
        FloatingPointError: when acting, for outputs that are not finite.
        KeyError: when acting, for numbers to draw with that the batch lacks.
    """

    out_keys: ClassVar[list[NestedKey]] = ["action", "action_value"]
    num_draws: ClassVar[int] = 128
    return_temperature: ClassVar[float] = 0.75
    """A factor on the logits, as in the notebook: below 1 it flattens."""

    def __init__(
        self,
        network: TensorDictModule,
        games: Sequence[str],
        *,
        decoding: str = "expert",
        kappa: float = 10.0,
    ) -> None:
        super().__init__()
        module = network.module
        if not isinstance(module, DecisionTransformer):
            raise TypeError(f"network must hold a DecisionTransformer, got {type(module).__name__}")
        known = ("expert", "expert_128", "sampled", "greedy") if module.return_token else ("sampled", "greedy")
        if decoding not in known:
            tokens = "with" if module.return_token else "without"
            raise ValueError(f"decoding must be one of {', '.join(known)} {tokens} return tokens, got {decoding!r}")
        self.games = resolve_games(games)
        self.network = module
        self.decoding = decoding
        check_number("kappa", kappa, 0)
        self.kappa = kappa
        self.in_keys = [("context", key) for key in ("observation", "action", "reward", "mask")] + ["game_id"]
        if decoding != "greedy":
            self.in_keys += ["uniform", "return_uniform"] if module.return_token else ["uniform"]
        device = module.position.device
        self.register_buffer("legal", legal_action_mask(self.games).to(device), persistent=False)

    @property
    def context_steps(self) -> int:
        """``K``, the steps of ``context`` that are read."""
        return self.network.num_steps

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        shape = tensordict["game_id"].shape
        if len(shape) != 1:
            flat = self(TensorDict({key: tensordict[key] for key in self.in_keys}, shape).reshape(-1))
            for key in self.out_keys:
                tensordict[key] = flat[key].unflatten(0, shape) if shape else flat[key].squeeze(0)
            return tensordict
        context = tensordict["context"]
        inputs = [context["observation"], context["action"], context["reward"]]
        inputs.append(torch.zeros_like(inputs[-1], dtype=torch.bool))  # nothing comes after the end of a game
        if self.network.return_token:
            return_logits = self.network.predict_return(context["observation"][:, 0])
            uniform = None if self.decoding == "greedy" else tensordict["return_uniform"]
            token = self.choose_return(check_outputs(return_logits), uniform)
            inputs.append((token + LOWEST_RETURN).unsqueeze(-1).expand_as(context["action"]))
        present = (context["mask"].sum(-1) - 1).clamp_min(0)  # rows without a step only fill the batch
        action_logits = self.network(*inputs)[0]
        logits_BA = check_outputs(action_logits[torch.arange(len(present), device=present.device), present])
        uniform = None if self.decoding == "greedy" else tensordict["uniform"]
        tensordict["action"] = self.choose_action(logits_BA, tensordict["game_id"], uniform)
        tensordict["action_value"] = logits_BA
        return tensordict

    def choose_return(self, logits_BR: Tensor, uniform_B: Tensor | None) -> Tensor:
        """Return tokens ``[B]`` int64, from logits ``[B, 121]`` and uniform numbers ``[B]`` (None if greedy)."""
        logits_BR = logits_BR.double()
        if self.decoding == "greedy":
            return logits_BR.argmax(-1)
        assert uniform_B is not None
        if self.decoding == "expert":
            tilt = torch.linspace(0, self.kappa, NUM_RETURNS, dtype=torch.float64, device=logits_BR.device)
            return sample_index((logits_BR + tilt).softmax(-1), uniform_B)
        if self.decoding == "expert_128":
            largest_B = (uniform_B.double() ** (1 / self.num_draws)).clamp_max(1 - 2**-53)  # a power may round to 1
            return sample_index((self.return_temperature * logits_BR).softmax(-1), largest_B)
        return sample_index(logits_BR.softmax(-1), uniform_B)

    def choose_action(self, logits_BA: Tensor, game_id_B: Tensor, uniform_B: Tensor | None) -> Tensor:
        """Actions ``[B]`` int64, from logits ``[B, 18]`` and uniform numbers ``[B]`` (None if greedy)."""
        logits_BA = logits_BA.double()
        allowed_BA = self.legal[game_id_B]
        if self.decoding == "greedy":
            return logits_BA.masked_fill(~allowed_BA, -torch.inf).argmax(-1)
        assert uniform_B is not None
        if self.decoding == "expert_128":
            allowed_BA = allowed_BA & (logits_BA > logits_BA.quantile(0.5, dim=-1, keepdim=True))
        return sample_index(logits_BA.softmax(-1) * allowed_BA, uniform_B)
