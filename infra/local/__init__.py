"""The complete stack on one machine, on loopback: `make up` and `make down`."""
