"""JupyterLab for tests: on this machine only, alone, and asking nobody else for anything."""

c = get_config()  # noqa: F821  (Jupyter gives it)
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.allow_root = True
c.ServerApp.open_browser = False
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.news_url = None
c.LabApp.extension_manager = "readonly"
c.LabApp.expose_app_in_browser = True  # so that tests can change the theme
