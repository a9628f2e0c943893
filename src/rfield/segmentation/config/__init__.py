"""The flags: dataclasses that import nothing but Python."""
