"""What both sides of a split model need: its parts, its adapters, the wire and the errors."""

__version__ = "0.1.0"
