"""xcon: contrastive pre-training of images, text and metadata for fine-grained recognition."""

__version__ = "0.1.0"
