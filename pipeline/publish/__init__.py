"""A finished run goes to the Hub."""
