"""The shared, business-free kit that every service stands on."""
