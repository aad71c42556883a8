"""The model itself: every part and every head, in torch alone. `fast` holds siblings that do less work."""
