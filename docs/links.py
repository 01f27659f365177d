"""What MkDocs calls: links of a page to files of the repository become links to where it is published."""


def on_page_markdown(markdown: str, config, **_) -> str:
    """Give links that leave docs the repository's address."""
    return markdown.replace("](../", f"]({config.repo_url}/blob/main/")
