//go:build integration

package integration

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// ingress has Traefik run, which takes up the Ingress that was there before it. Who asks at a node for the host that the Ingress names gets the page,
// from pods on either node; who asks for another does not.
func (s story) ingress() {
	if tools.Traefik == "" {
		s.t.Fatal("BERTH_TOOLS does not have traefik")
	}
	began := time.Now()
	must(s.t, s.c.StartIngress(s.t.Context(), tools.Traefik))
	s.t.Logf("Traefik is pushed, pulled and ready in %.1f s", time.Since(began).Seconds())
	web := s.ready("web", 2, long, nil)
	for _, n := range s.c.Nodes {
		at := ingress(n)
		s.answers(n.Name+"'s ingress controller", web, pageAt(at.url, at.host))
		if _, err := fetchPage(s.t.Context(), at.url, "other.example"); err == nil || !strings.Contains(err.Error(), http.StatusText(http.StatusNotFound)) {
			s.t.Errorf("%s's ingress controller, asked for other.example: %v", n.Name, err)
		}
	}
	s.eventually(long, "the Ingress has an address", func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "get", "ingress", "web", "-o", "jsonpath={.status.loadBalancer.ingress[*].ip}")
		if want := s.c.Nodes[0].Address(); err == nil && out != want {
			err = fmt.Errorf("it is %q, want %q", out, want)
		}
		return err
	})
	account := "--as=system:serviceaccount:kube-system:traefik"
	for words, want := range map[string]string{"list secrets": "yes", "list secrets --namespace kube-system": "no", "list pods": "no", "get nodes": "no"} {
		out, _ := s.c.Kubectl(s.t.Context(), append([]string{"auth", "can-i", account}, strings.Fields(words)...)...) // "no" is a failure
		if strings.TrimSpace(out) != want {
			s.t.Errorf("Traefik: may it %s? %q, want %s", words, out, want)
		}
	}
}
