"""``covr report``: one page that shows what runs did, from the files in their folders."""
