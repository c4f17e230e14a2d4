"""Records -> typed rows -> figures -> one offline HTML file."""
