"""Ways to reach clients; each is a Flower ``Grid``."""
