"""What a newcomer runs offline: a tiny SDXL, example photos and the demo."""
