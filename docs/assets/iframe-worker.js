// Browsers start no worker from a page that was opened as a file, and the search runs in one. Here it runs in a hidden
// frame instead, so that the documentation can be searched without a server. (The file's name is known to the theme's
// plugin `offline`, which would load a script of this kind from another host.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.scope = frame.contentWindow
      window.addEventListener("message", event => {
        if (event.source === this.scope) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      const page = frame.contentDocument
      page.open()
      page.write("<script>postMessage = message => parent.postMessage(message, '*')</" + "script>")
      page.write(`<script src="${url}"></` + "script>")
      this.ready = new Promise(resolve => { frame.onload = resolve })
      page.close()
    }

    postMessage(message) {
      this.ready.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data: message })))
    }
  }
}
