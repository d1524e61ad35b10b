"""Small references of networks that no package holds: formulas that draw each weight when they first need it.

What they have drawn is the peer's state dict, names and shapes included.
"""

import math

import torch
import torch.nn.functional as F


class Weights(dict):
    """Random weights by name."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, name, *shape):
        if name not in self:
            noise = torch.randn(shape, generator=self.generator)
            self[name] = noise / noise[0].numel() ** 0.5 if len(shape) > 1 else 0.2 * noise
        return self[name]

    def linear(self, name, x, out, bias=True):
        weight = self.draw(f"{name}.weight", out, x.shape[1])
        return F.linear(x, weight, self.draw(f"{name}.bias", out) if bias else None)

    def conv(self, name, x, out, k=3, **how):
        weight = self.draw(f"{name}.weight", out, x.shape[1], *[k] * (x.ndim - 2))
        convolve = F.conv2d if x.ndim == 4 else F.conv1d
        return convolve(x, weight, self.draw(f"{name}.bias", out), **{"padding": k // 2, **how})

    def norm(self, name, x, groups, eps):
        if f"{name}.weight" not in self:
            self[f"{name}.weight"] = 1 + 0.2 * torch.randn(x.shape[1], generator=self.generator)
        return F.group_norm(x, groups, self[f"{name}.weight"], self.draw(f"{name}.bias", x.shape[1]), eps)


def sinusoids(t, dim, steps, cosine_first):
    """The last frequency is 1 / 10000 where steps = dim / 2 - 1."""
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(dim // 2).double() / steps)
    parts = [angles.cos(), angles.sin()]
    return torch.cat(parts if cosine_first else parts[::-1], 1).float()


def attended(q, k, v):
    """(B, d, N) each; one head."""
    return v @ torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=-1).transpose(1, 2)


def openai(w, x, t, y=None, *, base, mults, blocks, attend, heads, classes, scale_shift, updown, new, out):
    """guided-diffusion's UNetModel, and improved-diffusion's with updown=False, new=False.

    Args:
        attend: factors by which the resolution is smaller where there is attention.
        heads: their number, of a width.
        new: the order of q, k and v.
    """
    emb = w.linear("time_embed.0", sinusoids(t, base, base // 2, True), 4 * base)
    emb = w.linear("time_embed.2", F.silu(emb), 4 * base)
    if classes:
        emb = emb + w.draw("label_emb.weight", classes, 4 * base)[y]

    def residual(name, h, c, resample=None):
        g = F.silu(w.norm(f"{name}.in_layers.0", h, 32, 1e-5))
        if resample is not None:
            g, h = resample(g), resample(h)
        g = w.conv(f"{name}.in_layers.2", g, c)
        e = w.linear(f"{name}.emb_layers.1", F.silu(emb), c * (1 + scale_shift))[:, :, None, None]
        g = w.norm(f"{name}.out_layers.0", g if scale_shift else g + e, 32, 1e-5)
        g = g * (1 + e[:, :c]) + e[:, c:] if scale_shift else g
        g = w.conv(f"{name}.out_layers.3", F.silu(g), c)
        return g + (h if h.shape[1] == c else w.conv(f"{name}.skip_connection", h, c, k=1))

    def attention(name, h):
        n, c = heads(h.shape[1]), h.shape[1]
        flat = h.flatten(2)
        qkv = w.conv(f"{name}.qkv", w.norm(f"{name}.norm", flat, 32, 1e-5), 3 * c, k=1)
        d = c // n
        parts = qkv.chunk(3, 1) if new else None
        found = []
        for i in range(n):
            own = [p[:, i * d : (i + 1) * d] for p in parts] if new else qkv[:, 3 * d * i :][:, : 3 * d].split(d, 1)
            found.append(attended(*own))
        return h + w.conv(f"{name}.proj_out", torch.cat(found, 1), c, k=1).view(h.shape)

    def halve(v):
        return F.avg_pool2d(v, 2)

    def double(v):
        return v.repeat_interleave(2, 2).repeat_interleave(2, 3)

    h = w.conv("input_blocks.0.0", x, int(mults[0] * base))
    seen, i, factor = [h], 1, 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            h = residual(f"input_blocks.{i}.0", h, int(mult * base))
            h = attention(f"input_blocks.{i}.1", h) if factor in attend else h
            seen, i = [*seen, h], i + 1
        if level < len(mults) - 1:
            down = f"input_blocks.{i}.0"
            h = residual(down, h, h.shape[1], halve) if updown else w.conv(f"{down}.op", h, h.shape[1], stride=2)
            seen, i, factor = [*seen, h], i + 1, 2 * factor
    h = residual("middle_block.0", h, h.shape[1])
    h = residual("middle_block.2", attention("middle_block.1", h), h.shape[1])
    i = 0
    for level, mult in reversed(list(enumerate(mults))):
        for j in range(blocks + 1):
            h = residual(f"output_blocks.{i}.0", torch.cat([h, seen.pop()], 1), int(mult * base))
            part = 1
            if factor in attend:
                h, part = attention(f"output_blocks.{i}.1", h), 2
            if level and j == blocks:
                up = f"output_blocks.{i}.{part}"
                h = residual(up, h, h.shape[1], double) if updown else w.conv(f"{up}.conv", double(h), h.shape[1])
                factor //= 2
            i += 1
    return w.conv("out.2", F.silu(w.norm("out.0", h, 32, 1e-5)), out)


def edm(w, x, noise, y=None, *, song, base, mults, blocks, attend, classes, augment=None):
    """EDM's SongUNet as DDPM++, or its DhariwalUNet.

    Args:
        noise: (B,) ln(sigma) / 4.
        attend: resolutions with attention.
        augment: (B, A) labels of the augmentation.
    """
    eps, scale, wide = (1e-6, math.sqrt(0.5), 1) if song else (1e-5, 1.0, 2)
    emb = sinusoids(noise, base, base // 2 - song, not song)
    one_hot = None if not classes else torch.eye(classes + 1)[:, :classes][y]
    if song and classes:
        emb = emb + w.linear("map_label", one_hot * math.sqrt(classes), base)
    if augment is not None:
        emb = emb + w.linear("map_augment", augment, base, bias=False)
    emb = w.linear("map_layer1", F.silu(w.linear("map_layer0", emb, 4 * base)), 4 * base)
    if not song and classes:
        emb = emb + w.linear("map_label", one_hot, 4 * base, bias=False)
    emb = F.silu(emb)

    def norm(name, h):
        return w.norm(name, h, min(32, h.shape[1] // 4), eps)

    def block(name, h, c, attention=False, resample=None):
        g = F.silu(norm(f"{name}.norm0", h))
        if resample is not None:
            w[f"{name}.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
            w[f"{name}.skip.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
            g, h = resample(g), resample(h)
        g = w.conv(f"{name}.conv0", g, c)
        e = w.linear(f"{name}.affine", emb, c * wide)[:, :, None, None]
        g = norm(f"{name}.norm1", g + e) if song else norm(f"{name}.norm1", g) * (1 + e[:, :c]) + e[:, c:]
        g = w.conv(f"{name}.conv1", F.silu(g), c)
        projected = h.shape[1] != c or (song and resample is not None)
        h = (g + (w.conv(f"{name}.skip", h, c, k=1) if projected else h)) * scale
        if attention:
            d = c if song else 64
            qkv = w.conv(f"{name}.qkv", norm(f"{name}.norm2", h), 3 * c, k=1).flatten(2)
            found = [attended(*(qkv[:, 3 * d * i :][:, : 3 * d][:, j::3] for j in range(3))) for i in range(c // d)]
            h = (h + w.conv(f"{name}.proj", torch.cat(found, 1).view(h.shape), c, k=1)) * scale
        return h

    size = x.shape[-1]
    h = w.conv(f"enc.{size}x{size}_conv", x, base if song else base * mults[0])
    seen = [h]
    for level, mult in enumerate(mults):
        n = f"{size >> level}x{size >> level}"
        if level:
            h = block(f"enc.{n}_down", h, h.shape[1], resample=lambda v: F.avg_pool2d(v, 2))
            seen.append(h)
        for i in range(blocks):
            h = block(f"enc.{n}_block{i}", h, base * mult, attention=size >> level in attend)
            seen.append(h)
    for level, mult in reversed(list(enumerate(mults))):
        n = f"{size >> level}x{size >> level}"
        if level == len(mults) - 1:
            h = block(f"dec.{n}_in1", block(f"dec.{n}_in0", h, h.shape[1], attention=True), h.shape[1])
        else:
            h = block(
                f"dec.{n}_up", h, h.shape[1], resample=lambda v: v.repeat_interleave(2, 2).repeat_interleave(2, 3)
            )
        for i in range(blocks + 1):
            here = size >> level in attend and (not song or i == blocks)
            h = block(f"dec.{n}_block{i}", torch.cat([h, seen.pop()], 1), base * mult, attention=here)
    ends = (f"dec.{size}x{size}_aux_norm", f"dec.{size}x{size}_aux_conv") if song else ("out_norm", "out_conv")
    return w.conv(ends[1], F.silu(norm(ends[0], h)), x.shape[1])
