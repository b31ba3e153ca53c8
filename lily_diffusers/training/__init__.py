"""DreamBooth training with Lily: photos -> cache -> loop -> adapter. See `train_dreambooth_lily.py`."""
