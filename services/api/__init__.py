"""The API service: answers clients from the volume, and asks for fetches of what is not there yet."""
