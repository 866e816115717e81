"""Feature nets: what turns images into the vectors that sets of images are compared by."""
