"""Image sources to tensors: folders, CIFAR-10, idx, npz, digits, data sets of the Hub.

`load_images(source)` gives an `ImageData`. It decodes an image when it is asked for and fits it to
one shape. `scan(source)` reads everything and reports what is broken.
"""

from __future__ import annotations

from demerge.data.load import load_images
from demerge.data.scan import Scan, scan
from demerge.data.values import ImageData

__all__ = ["ImageData", "Scan", "load_images", "scan"]
