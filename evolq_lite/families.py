"""The layers of other networks in the same words: variants of ViT, Swin, LeViT, ResNet, RegNet.

Each differs from ViT in where its products and sums are; `layers` explains the idea.
"""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, Mlp, PatchEmbed
from timm.models import levit, regnet, resnet, swin_transformer, vision_transformer
from torch import Tensor, nn

from evolq_lite import layers
from evolq_lite.config import QuantConfig
from evolq_lite.layers import FromFloat, QuantBlock, QuantProducts
from evolq_lite.quantizer import act_quantizer, sum_quantizer


class QuantParallelBlock(FromFloat, vision_transformer.ParallelThingsBlock):
    """timm's ViT block of several attentions and several MLPs side by side, both sums quantized."""

    def add_points(self, config: QuantConfig) -> None:
        self.sum1, self.sum2 = sum_quantizer(config), sum_quantizer(config)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(images, tokens, channels) to the same."""
        if attn_mask is not None or is_causal:
            raise ValueError("attention masks are not supported in parallel blocks")
        x = self.sum1(x + torch.stack([attend(x) for attend in self.attns]).sum(0))
        return self.sum2(x + torch.stack([mlp(x) for mlp in self.ffns]).sum(0))


class QuantAttentionPool(FromFloat, AttentionPoolLatent):
    """timm's attention pooling: a few learned queries attend to all tokens."""

    def add_points(self, config: QuantConfig) -> None:
        self.products = QuantProducts(config)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(images, tokens, channels) to (images, channels)."""
        images, tokens, _ = x.shape
        if self.pos_embed is not None:
            x = x + self.pos_embed
        queries = self.q(self.latent.expand(images, -1, -1))
        q = queries.view(images, self.latent_len, self.num_heads, self.head_dim).transpose(1, 2)
        kv = self.kv(x).view(images, tokens, 2, self.num_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (images, heads, tokens, head dim)
        x = self.products(self.q_norm(q), self.k_norm(k), v, self.scale, mask=attn_mask)
        x = self.proj_drop(self.proj(x))  # (images, queries, channels)
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x[:, 0] if self.pool == "token" else x.mean(1) if self.pool == "avg" else x


class QuantTokens(FromFloat, vision_transformer.VisionTransformer):
    """timm's ViT with a point at what else it adds up, and at the logits (option `outputs`).

        patches --> [] --+--> [tokens] --+--> [sum] --> blocks --> norm --> head --> [logits]
        class token -----+               |
        position embedding --> [positions]

    ValueError for variants that attach tokens and positions in another order.
    """

    def add_points(self, config: QuantConfig) -> None:
        usual = self.pos_embed is not None and not self.no_embed_class
        plain = usual and not self.dynamic_img_size and self.attn_pool is None
        if not plain or type(self.patch_embed) is not PatchEmbed:
            raise ValueError(f"outputs {ONLY_VIT}")
        self.tokens, self.positions = act_quantizer(config), act_quantizer(config)
        self.logits = act_quantizer(config)
        patch_embed: Any = self.patch_embed
        patch_embed.norm = with_output(patch_embed.norm, config)
        blocks: Any = self.blocks
        for block in blocks:
            attention, mlp = block.attn, block.mlp
            if (type(block), type(mlp)) != (QuantBlock, Mlp):
                raise ValueError(f"outputs {ONLY_VIT}")
            attention.proj_drop = with_output(attention.proj_drop, config)
            mlp.drop2 = with_output(block.mlp.drop2, config)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(images, patches, channels) to (images, tokens, channels)."""
        first = [token for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], 1)
        return self.pos_drop(self.tokens(x) + self.positions(self.pos_embed))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(images, tokens, channels) to logits (images, classes), or what the head reads."""
        x = super().forward_head(x, pre_logits)
        return x if pre_logits else self.logits(x)


ONLY_VIT = (
    "names points of timm's plain ViT (DeiT too), and this network is another; omit it, or give "
    "--no-outputs beside a preset"
)


def with_output(module: nn.Module, config: QuantConfig) -> nn.Sequential:
    """A module with a point at what it writes."""
    return nn.Sequential(OrderedDict({"0": module, "output": act_quantizer(config)}))


class QuantWindowAttention(FromFloat, swin_transformer.WindowAttention):
    """timm's Swin attention within windows, with relative position bias."""

    def add_points(self, config: QuantConfig) -> None:
        self.products = QuantProducts(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(windows, tokens, channels) to the same; mask (windows per image, tokens, tokens)."""
        windows, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # One mask for every window of an image, the same for all images and heads.
        if mask is not None:
            mask = mask.repeat(windows // len(mask), 1, 1).unsqueeze(1)
        x = self.products(q, k, v, self.scale, bias=self._get_rel_pos_bias(), mask=mask)
        return self.proj_drop(self.proj(x))


class QuantSwinBlock(FromFloat, swin_transformer.SwinTransformerBlock):
    """timm's Swin block, with its two residual sums quantized."""

    def add_points(self, config: QuantConfig) -> None:
        self.sum1, self.sum2 = sum_quantizer(config), sum_quantizer(config)

    def forward(self, x: Tensor) -> Tensor:
        """(images, height, width, channels) to the same."""
        x = self.sum1(x + self.drop_path1(self._attn(self.norm1(x))))
        return self.sum2(x + self.drop_path2(self.mlp(self.norm2(x))))


def refuse_convolutions(attention: levit.Attention | levit.AttentionDownsample) -> None:
    """ValueError for LeViT's convolutional form, whose tokens lie on a grid."""
    if attention.use_conv:
        raise ValueError("LeViT with convolutions (levit_conv_*) is not supported; use levit_*")


class QuantLevitAttention(FromFloat, levit.Attention):
    """timm's LeViT attention, in its linear form."""

    def add_points(self, config: QuantConfig) -> None:
        refuse_convolutions(self)
        self.products = QuantProducts(config)

    def forward(self, x: Tensor) -> Tensor:
        """(images, tokens, channels) to the same."""
        images, tokens, _ = x.shape
        qkv = self.qkv(x).view(images, tokens, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        x = self.products(q, k, v, self.scale, bias=self.get_attention_biases(x.device))
        return self.proj(x)


class QuantLevitDownsample(FromFloat, levit.AttentionDownsample):
    """timm's LeViT attention with fewer queries than keys, between stages."""

    def add_points(self, config: QuantConfig) -> None:
        refuse_convolutions(self)
        self.products = QuantProducts(config)

    def forward(self, x: Tensor) -> Tensor:
        """(images, tokens, channels) to (images, fewer tokens, more channels)."""
        images, tokens, _ = x.shape
        kv = self.kv(x).view(images, tokens, self.num_heads, -1).transpose(1, 2)
        k, v = kv.split([self.key_dim, self.val_dim], dim=3)
        q = self.q(x).view(images, -1, self.num_heads, self.key_dim).transpose(1, 2)
        x = self.products(q, k, v, self.scale, bias=self.get_attention_biases(x.device))
        return self.proj(x)


class QuantLevitBlock(FromFloat, levit.LevitBlock):
    """timm's LeViT block, both residual sums quantized (per tensor: no LayerNorm follows)."""

    def add_points(self, config: QuantConfig) -> None:
        self.sum1, self.sum2 = act_quantizer(config), act_quantizer(config)

    def forward(self, x: Tensor) -> Tensor:
        """(images, tokens, channels) to the same."""
        x = self.sum1(x + self.drop_path1(self.attn(x)))
        return self.sum2(x + self.drop_path2(self.mlp(x)))


class QuantPreBottleneck(FromFloat, regnet.PreBottleneck):
    """timm's RegNet block with BatchNorm before each convolution (RegNet-V), its sum quantized."""

    def add_points(self, config: QuantConfig) -> None:
        self.sum = act_quantizer(config)

    def forward(self, x: Tensor) -> Tensor:
        """(images, channels, height, width) to (images, channels, height, width)."""
        return self.sum(super().forward(x))


QUANTIZED: dict[type[nn.Module], type[FromFloat]] = {
    **layers.QUANTIZED,
    vision_transformer.ParallelThingsBlock: QuantParallelBlock,
    AttentionPoolLatent: QuantAttentionPool,
    swin_transformer.WindowAttention: QuantWindowAttention,
    swin_transformer.SwinTransformerBlock: QuantSwinBlock,
    levit.Attention: QuantLevitAttention,
    levit.AttentionDownsample: QuantLevitDownsample,
    levit.LevitBlock: QuantLevitBlock,
    regnet.PreBottleneck: QuantPreBottleneck,
}
# A ResNet or RegNet block has a slot after its sum already: the activation that follows. A point
# goes there. The convolutions of squeeze-and-excite (RegNet-Y) are quantized where they are; its
# gate, a product of each channel with one number and not of matrices, is not: the next
# convolution's input is.
LAST_ACTIVATION: dict[type[nn.Module], str] = {
    resnet.BasicBlock: "act2",
    resnet.Bottleneck: "act3",
    regnet.Bottleneck: "act3",
}
