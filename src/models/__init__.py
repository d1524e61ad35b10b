"""Networks, on torch alone. Called as net(x, t), x (B, C, H, W), t (B,) a noise condition, they return (B, C, H, W).

A network with `num_classes` takes labels too, net(x, t, y) with y (B,) int64; the label num_classes means "none".
"""
