"""The demo data, with their licences."""
