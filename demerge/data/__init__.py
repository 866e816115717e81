"""Image sources -> tensors: folders, CIFAR-10 batches, idx files, npz, scikit-learn's digits, data sets of the Hub.

`load_images(source)` gives an `ImageData`, whose images are decoded when they are asked for and fitted to one shape;
`scan(source)` reads everything and tells what is there and what is broken.
"""

from __future__ import annotations

from demerge.data.load import load_images
from demerge.data.scan import Scan, scan
from demerge.data.values import ImageData

__all__ = ["ImageData", "Scan", "load_images", "scan"]
