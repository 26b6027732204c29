"""What would go wrong with a quantized file on a device, found here."""
