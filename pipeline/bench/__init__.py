"""bitpress compared with other programs that quantize and run models."""
