"""What the reports share: HTML pages, figures, images as bytes."""
