"""Plain functions and the types that cross rooms; imports nothing from the other rooms."""
