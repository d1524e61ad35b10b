"""Networks, on torch alone. Called as net(x, t), x (B, C, H, W), t (B,) a noise condition, they return (B, C, H, W)."""
