"""From image-caption files to batches: prepare, the .beton format, the loader, the augmentations."""
