"""What an adapter is before anybody asks for it: its files, copied, verified and made ready."""
