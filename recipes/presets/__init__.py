"""Commented recipes that ship with the package; `shoestring new` copies them."""
