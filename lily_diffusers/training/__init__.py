"""DreamBooth training with Lily: photos -> cache -> loop -> adapter. `train_dreambooth_lily.py` reads as its contents."""
