"""What clients do beside plain steps: one method a file."""
