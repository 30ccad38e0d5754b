package admin

import (
	"net/http"

	"github.com/berth-run/berth/images"
)

// Reference is a request about an image of a registry.
type Reference struct {
	Image string `json:"image"`
	Auth  *Auth  `json:"auth,omitempty"`
}

// Auth is images.Auth as it travels.
type Auth struct {
	Username      string `json:"username,omitempty"`
	Password      string `json:"password,omitempty"`
	ServerAddress string `json:"serverAddress,omitempty"`
	IdentityToken string `json:"identityToken,omitempty"`
	RegistryToken string `json:"registryToken,omitempty"`
}

// String keeps secrets out of logs and errors.
func (a *Auth) String() string { return "REDACTED" }

func (a *Auth) credentials() *images.Auth {
	if a == nil {
		return nil
	}
	return &images.Auth{
		Username: a.Username, Password: a.Password, ServerAddress: a.ServerAddress,
		IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
	}
}

// explain asks the registry's hosts.
func (s *Server) explain(w http.ResponseWriter, r *http.Request) error {
	req, err := ask[Reference](w, r)
	if err != nil {
		return err
	}
	e, err := s.store.Explain(r.Context(), req.Image, req.Auth.credentials())
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, e)
	return nil
}
