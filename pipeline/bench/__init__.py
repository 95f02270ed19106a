"""bitpress beside other programs that quantize and run models."""
