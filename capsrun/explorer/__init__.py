"""The page of `capsrun explore`: what it shows, and the files that it is made of."""
