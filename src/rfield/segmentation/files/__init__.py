"""Files: written whole, and read with care where strangers wrote them."""
