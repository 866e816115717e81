"""What a conflict map says: verdict, text, page, plots, next steps."""
